"""ModelConfig reads every spelling of a Llama 4 config.json and refuses what it cannot serve, by name."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from tiny_models import MAVERICK, SCOUT, TINY_CONFIGS
from transformers import Llama4Config, Llama4TextConfig

from router.config import ConfigError, Llama3Scaling, ModelConfig, RopeConfig

SCOUT_SCALING = Llama3Scaling(
    factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=32
)


def parse(**changes: Any) -> ModelConfig:
    return ModelConfig.from_checkpoint_config(SCOUT | {"model_type": "llama4_text"} | changes)


def legacy(**changes: Any) -> dict[str, Any]:
    """The spelling of published files: transformers 4, nested, oddly typed, with junk."""
    text = {key: value for key, value in SCOUT.items() if key != "rope_parameters"}
    text |= {
        "rope_theta": 500000.0,
        "rope_scaling": {k: v for k, v in SCOUT["rope_parameters"].items() if k != "rope_theta"},
        "no_rope_layers": [],
        "attn_temperature_tuning": 4,
        "floor_scale": 8.0,
        "for_llm_compressor": False,
        "cache_implementation": "hybrid",
        "router_aux_loss_coef": 0.001,
        "model_type": "llama4_text",
    }
    architectures = ["Llama4ForConditionalGeneration"]
    return {"model_type": "llama4", "architectures": architectures, "text_config": text | changes}


def test_legacy_and_current_spelling_mean_the_same() -> None:
    assert ModelConfig.from_checkpoint_config(legacy()) == parse()


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_flat_config_saved_by_transformers_is_read(name: str) -> None:
    written = Llama4TextConfig(**TINY_CONFIGS[name]).to_dict()
    config = ModelConfig.from_checkpoint_config(written)
    assert config.moe_layers == tuple(written["moe_layers"])
    assert config.rope_layers == tuple(flag == 1 for flag in written["no_rope_layers"])
    assert config.eos_token_ids == (2, 3)
    assert config.rope.theta == 500000.0


def test_nested_config_saved_by_transformers_reads_as_its_text_part() -> None:
    nested = Llama4Config(text_config=Llama4TextConfig(**MAVERICK)).to_dict()
    flat = Llama4TextConfig(**MAVERICK).to_dict()
    assert ModelConfig.from_checkpoint_config(nested) == ModelConfig.from_checkpoint_config(flat)


def test_missing_keys_take_the_defaults_of_transformers() -> None:
    config = ModelConfig.from_checkpoint_config({"model_type": "llama4_text"})
    default = Llama4TextConfig()
    assert config.hidden_size == default.hidden_size
    assert config.num_key_value_heads == default.num_key_value_heads
    assert config.head_dim == default.head_dim
    assert config.attention_chunk_size == default.attention_chunk_size
    assert config.moe_layers == tuple(default.moe_layers)
    assert config.rope_layers == tuple(flag == 1 for flag in default.no_rope_layers)
    assert config.rope == RopeConfig(theta=default.rope_parameters["rope_theta"], scaling=None)
    assert (config.floor_scale, config.attn_scale) == (default.floor_scale, default.attn_scale)


def test_null_means_what_it_means_to_transformers() -> None:
    config = parse(num_key_value_heads=None, head_dim=None, moe_layers=None, attn_temperature_tuning=None)
    assert config.num_key_value_heads == 8
    assert config.head_dim == 64 // 8
    assert config.moe_layers == tuple(range(8))
    assert config.attn_temperature_tuning
    assert parse(attention_chunk_size=None).attention_chunk_size is None


@pytest.mark.parametrize(("value", "meaning"), [(4, True), (0, False), (True, True), (False, False), (1.0, True)])
def test_temperature_tuning_may_be_a_number(value: object, meaning: bool) -> None:
    assert parse(attn_temperature_tuning=value).attn_temperature_tuning is meaning


def test_moe_layers_follow_the_step_or_the_explicit_list() -> None:
    assert parse(interleave_moe_layer_step=2).moe_layers == (1, 3, 5, 7)
    assert parse(interleave_moe_layer_step=2, moe_layers=[7, 1, 2]).moe_layers == (1, 2, 7)
    assert parse(moe_layers=[]).moe_layers == ()


def test_rope_layers_follow_the_list_or_the_interval() -> None:
    assert parse(no_rope_layers=[1, 0] * 4).rope_layers == (True, False) * 4
    assert parse(no_rope_layer_interval=2).rope_layers == (True, False) * 4
    assert parse().local_layers == (0, 1, 2, 4, 5, 6)
    assert parse().global_layers == (3, 7)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": SCOUT["rope_parameters"]},
        {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": SCOUT["rope_parameters"]},
        {"rope_parameters": None, "rope_scaling": {**SCOUT["rope_parameters"], "rope_type": None, "type": "llama3"}},
    ],
)
def test_scaled_rope_in_every_spelling(rope: dict[str, Any]) -> None:
    assert parse(**rope).rope == RopeConfig(theta=500000.0, scaling=SCOUT_SCALING)


def test_unscaled_rope_in_every_spelling() -> None:
    plain = RopeConfig(theta=1000.0, scaling=None)
    assert parse(rope_parameters=None, rope_theta=1000).rope == plain
    assert parse(rope_parameters={"rope_type": "default", "rope_theta": 1000.0}).rope == plain
    assert parse(rope_parameters={"rope_type": None, "rope_theta": 1000.0}).rope == plain


def test_stop_tokens_may_be_one_several_or_none() -> None:
    assert parse(eos_token_id=5).eos_token_ids == (5,)
    assert parse(eos_token_id=[5, 6]).eos_token_ids == (5, 6)
    assert parse(eos_token_id=None).eos_token_ids == ()


def test_end_tokens_are_those_of_generation_config_json_where_it_has_them() -> None:
    raw = SCOUT | {"model_type": "llama4_text", "eos_token_id": 5}
    assert ModelConfig.from_checkpoint_config(raw, {"eos_token_id": [6, 7]}).eos_token_ids == (6, 7)
    assert ModelConfig.from_checkpoint_config(legacy(), {"eos_token_id": 6}).eos_token_ids == (6,)
    assert ModelConfig.from_checkpoint_config(raw, {"eos_token_id": None, "top_p": 0.9}).eos_token_ids == (5,)


def test_a_malformed_end_token_of_generation_config_json_names_that_file() -> None:
    raw = SCOUT | {"model_type": "llama4_text"}
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id = \[512\]: must be below"):
        ModelConfig.from_checkpoint_config(raw, {"eos_token_id": [512]})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", "64"),
        ("hidden_size", 64.5),
        ("hidden_size", True),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("rms_norm_eps", 0.0),
        ("rms_norm_eps", float("nan")),
        ("num_experts_per_tok", 5),
        ("interleave_moe_layer_step", 0),
        ("moe_layers", [8]),
        ("moe_layers", [1, 1]),
        ("moe_layers", "all"),
        ("no_rope_layers", [1, 0]),
        ("no_rope_layers", [2] * 8),
        ("no_rope_layer_interval", 0),
        ("layer_types", ["full_attention"] * 8),
        ("layer_types", "full"),
        ("attention_chunk_size", 0),
        ("attn_temperature_tuning", "yes"),
        ("floor_scale", 0),
        ("attn_scale", float("inf")),
        ("rope_theta", -1.0),
        ("rope_scaling", [1]),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("eos_token_id", "end"),
        ("eos_token_id", [2, 512]),
        ("bos_token_id", -1),
    ],
)
def test_malformed_value_is_refused_naming_field_and_value(field: str, value: object) -> None:
    changes = {field: value} | ({"rope_parameters": None} if field.startswith("rope") else {})
    with pytest.raises(ConfigError) as refusal:
        parse(**changes)
    assert field in str(refusal.value)
    assert repr(value) in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_type": "yarn"}, "rope_parameters.rope_type = 'yarn'"),
        ({"factor": None}, "rope_parameters.factor = None: missing"),
        ({"high_freq_factor": 0.5}, "rope_parameters.high_freq_factor = 0.5"),
    ],
)
def test_malformed_rope_is_refused_by_its_path(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        parse(rope_parameters=SCOUT["rope_parameters"] | change)


def test_error_in_a_nested_config_names_the_path() -> None:
    with pytest.raises(ConfigError, match=r"text_config\.hidden_size = 'wide'"):
        ModelConfig.from_checkpoint_config(legacy(hidden_size="wide"))


def test_unknown_architecture_is_named() -> None:
    raw = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    with pytest.raises(ConfigError, match=r"model_type = 'mixtral'.*MixtralForCausalLM"):
        ModelConfig.from_checkpoint_config(raw)


@pytest.mark.parametrize("nested", [True, False])
def test_quantised_checkpoint_is_refused_with_the_reason(nested: bool) -> None:
    quantization = {"quantization_config": {"quant_method": "compressed-tensors"}}
    raw = legacy(**quantization) if nested else legacy() | quantization
    with pytest.raises(ConfigError, match="'compressed-tensors': quantised checkpoints are not supported"):
        ModelConfig.from_checkpoint_config(raw)


def test_block_size_is_the_largest_divisor_of_the_chunk_up_to_sixteen() -> None:
    assert parse(attention_chunk_size=8192).block_size_for(None) == 16
    assert parse(attention_chunk_size=60).block_size_for(None) == 15
    assert parse(attention_chunk_size=17).block_size_for(None) == 1
    assert parse(attention_chunk_size=None).block_size_for(None) == 16


def test_block_size_that_straddles_chunks_is_refused() -> None:
    assert parse(attention_chunk_size=64).block_size_for(32) == 32
    with pytest.raises(ValueError, match=r"block_size = 24: .* attention_chunk_size = 64"):
        parse(attention_chunk_size=64).block_size_for(24)
    with pytest.raises(ValueError, match="block_size = 0"):
        parse().block_size_for(0)


def test_reading_a_config_does_not_import_torch() -> None:
    program = "import sys, router.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
