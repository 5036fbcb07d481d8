"""Random checkpoints: what transformers makes of them, the skewed gate, and how they are written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Llama4ForCausalLM

from cluster.checkpoints.byte_tokenizer import BOS_TOKEN_ID, EOS_TOKEN_IDS, PAD_TOKEN_ID, SPECIAL_TOKENS, VOCAB_SIZE
from cluster.checkpoints.expert_skew import ExpertSkew
from cluster.checkpoints.presets import PRESETS, create_checkpoint
from cluster.checkpoints.random_weights import PIECE_ELEMENTS, plan_weights
from experts.checkpoint import Checkpoint
from experts.weights import validate_experts
from router.config import ModelConfig
from router.weights import validate_router

# mid's initialisation and layout at a size that a test can run: its share of layers, heads and experts.
SMALL_MID = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "intermediate_size_mlp": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}
MODELS: list[tuple[str, dict[str, Any]]] = [("tiny-scout", {}), ("tiny-maverick", {}), ("mid", SMALL_MID)]
IDS = ["tiny-scout", "tiny-maverick", "small mid"]

# Of the tokens of each layer, and of all layers together: 512 random tokens leave a deviation of 0.02 a layer.
LAYER_TOLERANCE = 0.08
OVERALL_TOLERANCE = 0.04


def load(folder: Path) -> Llama4ForCausalLM:
    model, told = Llama4ForCausalLM.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


def hot_shares(folder: Path, num_hot_experts: int, token_ids_1T: torch.Tensor) -> list[float]:
    """The share of tokens whose expert is one of the first ``num_hot_experts``, for each MoE layer."""
    model = load(folder)
    with torch.no_grad():
        output = model(token_ids_1T, output_router_logits=True, use_cache=False)
    return [float((logits_TE.argmax(-1) < num_hot_experts).float().mean()) for logits_TE in output.router_logits]


def random_tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (1, 512), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("preset", "overrides"), MODELS, ids=IDS)
def test_transformers_finds_every_tensor_and_computes_sane_values(
    tmp_path: Path, preset: str, overrides: dict[str, Any]
) -> None:
    folder = create_checkpoint(preset, tmp_path / "model", config_overrides=overrides)
    model = load(folder)

    with torch.no_grad():
        output = model(random_tokens(model.config.vocab_size)[:, :64], output_hidden_states=True, use_cache=False)

    assert model.dtype == getattr(torch, PRESETS[preset]["torch_dtype"])
    assert output.logits.isfinite().all()
    assert all(0.1 < hidden.float().pow(2).mean().sqrt() < 20 for hidden in output.hidden_states)
    assert 0.5 < output.logits.float().std() < 5
    assert model.generation_config.eos_token_id == list(EOS_TOKEN_IDS)


@pytest.mark.parametrize(("preset", "overrides"), MODELS, ids=IDS)
def test_our_own_loaders_accept_every_preset(tmp_path: Path, preset: str, overrides: dict[str, Any]) -> None:
    checkpoint = Checkpoint.open(create_checkpoint(preset, tmp_path / "model", config_overrides=overrides))

    config = ModelConfig.from_checkpoint_config(checkpoint.config)
    validate_router(checkpoint, config)
    validate_experts(checkpoint, config.moe_layers, config.expert_shape)


def test_mid_has_814_million_parameters() -> None:
    num_parameters = sum(weight.spec.num_bytes // 2 for weight in plan_weights(PRESETS["mid"]))

    assert num_parameters == 814_343_168


def test_tiny_norm_weights_and_temperature_leave_nothing_at_its_default(tmp_path: Path) -> None:
    tensors = load_file(create_checkpoint("tiny-scout", tmp_path / "model") / "model.safetensors")

    norms = [tensor for name, tensor in tensors.items() if "norm" in name]
    assert len(norms) == 17
    assert all(norm.std() > 0.1 for norm in norms)
    assert tensors["lm_head.weight"].std() > 0.19
    assert PRESETS["tiny-scout"]["floor_scale"] == 8


@pytest.mark.parametrize(("preset", "overrides"), MODELS, ids=IDS)
@pytest.mark.parametrize("skew", ["0.8:1", "0.6:2"])
def test_a_skewed_gate_sends_the_share_to_the_hot_experts_of_every_layer(
    tmp_path: Path, preset: str, overrides: dict[str, Any], skew: str
) -> None:
    folder = create_checkpoint(preset, tmp_path / "model", expert_skew=skew, config_overrides=overrides)
    parsed = ExpertSkew.parse(skew)

    vocab_size = {**PRESETS[preset], **overrides}["vocab_size"]
    shares = hot_shares(folder, parsed.num_hot_experts, random_tokens(vocab_size))

    assert all(abs(share - parsed.share) < LAYER_TOLERANCE for share in shares), shares
    assert abs(sum(shares) / len(shares) - parsed.share) < OVERALL_TOLERANCE


def test_a_skewed_gate_keeps_its_share_on_text_and_on_one_repeated_token(tmp_path: Path) -> None:
    folder = create_checkpoint("tiny-scout", tmp_path / "model", expert_skew="0.75:1")
    text = torch.tensor([list(b"The arriero drives a train of pack llamas over the pass before the snow comes.")])

    for token_ids_1T in (text, torch.full((1, 64), ord("e"))):
        shares = hot_shares(folder, 1, token_ids_1T)
        assert abs(sum(shares) / len(shares) - 0.75) <= 1 / 8


def test_without_a_skew_no_expert_takes_most_tokens(tmp_path: Path) -> None:
    folder = create_checkpoint("mid", tmp_path / "model", config_overrides=SMALL_MID)
    with torch.no_grad():
        output = load(folder)(random_tokens(2048), output_router_logits=True, use_cache=False)

    for logits_TE in output.router_logits:
        counts_E = torch.bincount(logits_TE.argmax(-1), minlength=16)
        assert counts_E.min() > 0
        assert counts_E.max() < 512 / 4


@pytest.mark.parametrize(
    "text", ["", "0.8", "0.8:", ":2", "x:2", "0.8:2.5", "0:1", "-0.5:1", "1.1:1", "nan:1", "0.5:0"]
)
def test_a_malformed_skew_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expert_skew"):
        create_checkpoint("tiny-scout", tmp_path / "model", expert_skew=text)
    assert not list(tmp_path.iterdir())


def test_more_hot_experts_than_experts_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expert_skew: 5 hot experts, the model has 4"):
        create_checkpoint("tiny-scout", tmp_path / "model", expert_skew="0.5:5")
    assert not list(tmp_path.iterdir())


def test_an_unknown_preset_and_a_full_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")

    with pytest.raises(ValueError, match="preset must be one of tiny-scout, tiny-maverick, mid, got 'large'"):
        create_checkpoint("large", tmp_path / "model")
    with pytest.raises(ValueError, match="out must be a new or empty folder"):
        create_checkpoint("tiny-scout", tmp_path)
    with pytest.raises(ValueError, match="out must be a new or empty folder"):
        create_checkpoint("tiny-scout", tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_seed_alone_decides_the_values_however_they_are_sharded(tmp_path: Path) -> None:
    one = load_file(create_checkpoint("tiny-maverick", tmp_path / "a", seed=7) / "model.safetensors")
    sharded = create_checkpoint("tiny-maverick", tmp_path / "deep" / "b", seed=7, max_shard_bytes=300_000)
    other = load_file(create_checkpoint("tiny-maverick", tmp_path / "c", seed=8) / "model.safetensors")

    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert set(index["weight_map"]) == set(one)
    for name, file_name in index["weight_map"].items():
        assert torch.equal(load_file(sharded / file_name)[name], one[name])
        assert not torch.equal(other[name], one[name])


CREATE_AND_MEASURE = """
import sys
from pathlib import Path
from cluster.checkpoints.presets import create_checkpoint

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

create_checkpoint("tiny-scout", sys.argv[1] + "/warm")
before = status("VmRSS")
overrides = {"num_hidden_layers": 2, "num_local_experts": 24, "vocab_size": 1000}
create_checkpoint("mid", sys.argv[1] + "/model", config_overrides=overrides)
print(status("VmHWM") - before)
"""


def test_writing_holds_a_few_pieces_however_large_a_tensor_is(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CREATE_AND_MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )

    largest = max(
        info.num_bytes
        for info in map(Checkpoint.open(tmp_path / "model").info, ["model.layers.1.feed_forward.experts.gate_up_proj"])
    )
    assert largest > 200_000_000
    assert int(done.stdout) < 8 * PIECE_ELEMENTS * 4 < largest


def test_the_list_of_presets_does_not_load_torch() -> None:
    code = "import sys, cluster.checkpoints.presets; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_tokenizer_is_bytes_with_the_special_tokens_of_llama_4(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(create_checkpoint("tiny-scout", tmp_path / "model"))
    text = "Ein Maultier, ñandú, \u4f60\n\t\0 " + "".join(map(chr, range(32, 400)))

    assert tokenizer(text).input_ids == [BOS_TOKEN_ID, *text.encode()]
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert len(tokenizer) == VOCAB_SIZE <= PRESETS["tiny-scout"]["vocab_size"]
    assert tokenizer("<|eot|>a<|patch|>", add_special_tokens=False).input_ids == [264, 97, 348]
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (BOS_TOKEN_ID, PAD_TOKEN_ID)
    assert all(tokenizer.convert_tokens_to_ids(name) == token_id for name, token_id in SPECIAL_TOKENS.items())
