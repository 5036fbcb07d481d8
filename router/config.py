"""What a Llama 4 text model is made of, read from a checkpoint's config.json. No torch here: the gateway reads it too.

Accepts the nested ``llama4`` config (its text part) and the flat ``llama4_text``, the spelling of transformers 4
(rope_theta + rope_scaling) and of 5 (rope_parameters + layer_types), and the oddities of published files
(int, float or bool for the same field, missing keys, ``no_rope_layers: []``). A missing key takes the default of
transformers' Llama4TextConfig, since transformers leaves out what equals it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experts.expert_shape import ExpertShape
from router.config_fields import ConfigError, ConfigFields

__all__ = ["ConfigError", "Llama3Scaling", "ModelConfig", "RopeConfig"]

DEFAULT_MAX_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Rope frequencies whose wavelength exceeds the original context are divided by ``factor``."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    theta: float
    scaling: Llama3Scaling | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Llama 4 text. Field names are config.json's, but for ``rope_layers``.

    ``rope_layers[i]`` is True for a local layer (RoPE, attention within the current chunk) and False for a global
    one (no position encoding, temperature tuning, full causal attention); config.json calls it no_rope_layers,
    where 1 means rope. ``attention_chunk_size`` None means that rope layers attend to everything.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    intermediate_size_mlp: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    num_experts_per_tok: int
    num_local_experts: int
    moe_layers: tuple[int, ...]
    rope_layers: tuple[bool, ...]
    use_qk_norm: bool
    attention_chunk_size: int | None
    attn_temperature_tuning: bool
    floor_scale: float
    attn_scale: float
    rope: RopeConfig
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    tie_word_embeddings: bool
    torch_dtype: str | None

    @classmethod
    def from_checkpoint_config(cls, raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """``raw`` is the whole config.json, ``generation`` the whole generation_config.json where there is one.

        The end tokens are generation_config.json's if it has any: instruct checkpoints may list more of them there.
        Raises ConfigError naming file, field, its value and what is wrong.
        """
        outer = ConfigFields(raw)
        generation_fields = ConfigFields(generation or {}, file_name="generation_config.json")
        text = _text_fields(outer)
        _refuse_unsupported(outer, text)
        vocab_size = text.integer("vocab_size", 202048)
        num_layers = text.integer("num_hidden_layers", 48)
        num_heads = text.integer("num_attention_heads", 40)
        hidden_size = text.integer("hidden_size", 5120)
        num_experts = text.integer("num_local_experts", 16)
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=text.integer("intermediate_size", 8192),
            intermediate_size_mlp=text.integer("intermediate_size_mlp", 16384),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=_num_key_value_heads(text, num_heads),
            head_dim=_head_dim(text, hidden_size, num_heads),
            rms_norm_eps=text.number("rms_norm_eps", 1e-5, above=0.0),
            num_experts_per_tok=_num_experts_per_tok(text, num_experts),
            num_local_experts=num_experts,
            moe_layers=_moe_layers(text, num_layers),
            rope_layers=_rope_layers(text, num_layers),
            use_qk_norm=text.boolean("use_qk_norm", True),
            attention_chunk_size=_attention_chunk_size(text),
            attn_temperature_tuning=text.boolean("attn_temperature_tuning", True),
            floor_scale=text.number("floor_scale", 8192.0, above=0.0),
            attn_scale=text.number("attn_scale", 0.1),
            rope=_rope(text),
            max_position_embeddings=text.integer("max_position_embeddings", 131072),
            bos_token_id=_first_with("bos_token_id", text, outer).optional_integer("bos_token_id"),
            eos_token_ids=_eos_token_ids(_first_with("eos_token_id", generation_fields, text, outer), vocab_size),
            tie_word_embeddings=_first_with("tie_word_embeddings", text, outer).boolean("tie_word_embeddings", False),
            torch_dtype=_torch_dtype(text, outer),
        )

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    @property
    def global_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer, is_local in enumerate(self.rope_layers) if not is_local)

    @property
    def local_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer, is_local in enumerate(self.rope_layers) if is_local)

    @property
    def expert_shape(self) -> ExpertShape:
        return ExpertShape(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_experts=self.num_local_experts,
        )

    def block_size_for(self, requested: int | None) -> int:
        """The KV block size in positions: what was asked for, or the chunk's largest divisor up to 16.

        Raises ValueError when the requested size does not divide the attention chunk: a block would then belong
        to two chunks.
        """
        chunk = self.attention_chunk_size
        if requested is None:
            sizes = range(DEFAULT_MAX_BLOCK_SIZE, 0, -1)
            return next(size for size in sizes if chunk is None or chunk % size == 0)
        if requested < 1 or (chunk is not None and chunk % requested != 0):
            raise ValueError(f"block_size = {requested}: must be >= 1 and divide attention_chunk_size = {chunk}")
        return requested


def _text_fields(outer: ConfigFields) -> ConfigFields:
    model_type = outer.raw.get("model_type")
    if model_type == "llama4_text":
        return outer
    if model_type == "llama4":
        text = outer.nested("text_config")
        if text is None:
            raise outer.error("text_config", "missing from a llama4 config")
        return text
    architectures = outer.raw.get("architectures")
    raise outer.error(
        "model_type", f"architecture {architectures!r} is not supported; Arriero serves llama4 and llama4_text"
    )


def _refuse_unsupported(outer: ConfigFields, text: ConfigFields) -> None:
    for fields in (outer, text):
        for name in ("quantization_config", "compression_config"):
            quantization = fields.nested(name)
            if quantization is not None:
                raise ConfigError(
                    f"{fields.path}{name}.quant_method",
                    quantization.raw.get("quant_method"),
                    "quantised checkpoints are not supported; use the bfloat16 or float32 weights",
                )
    if text.boolean("attention_bias", False):
        raise text.error("attention_bias", "projections with a bias are not supported")
    if text.text("hidden_act", "silu") != "silu":
        raise text.error("hidden_act", "only silu is supported")


def _num_key_value_heads(text: ConfigFields, num_heads: int) -> int:
    num_kv_heads = text.integer("num_key_value_heads", num_heads if text.is_null("num_key_value_heads") else 8)
    if num_heads % num_kv_heads != 0:
        raise text.error("num_key_value_heads", f"must divide num_attention_heads = {num_heads}")
    return num_kv_heads


def _head_dim(text: ConfigFields, hidden_size: int, num_heads: int) -> int:
    head_dim = text.integer("head_dim", hidden_size // num_heads if text.is_null("head_dim") else 128)
    if head_dim % 2 != 0:
        raise text.error("head_dim", f"{head_dim} is odd; rope rotates pairs")
    return head_dim


def _num_experts_per_tok(text: ConfigFields, num_experts: int) -> int:
    top_k = text.integer("num_experts_per_tok", 1)
    if top_k > num_experts:
        raise text.error("num_experts_per_tok", f"must be <= num_local_experts = {num_experts}")
    return top_k


def _attention_chunk_size(text: ConfigFields) -> int | None:
    return None if text.is_null("attention_chunk_size") else text.integer("attention_chunk_size", 8192)


def _moe_layers(text: ConfigFields, num_layers: int) -> tuple[int, ...]:
    layers = text.integers("moe_layers")
    if layers is None:
        step = text.integer("interleave_moe_layer_step", 1)
        return tuple(range(step - 1, num_layers, step))
    if len(set(layers)) != len(layers) or any(layer >= num_layers for layer in layers):
        raise text.error("moe_layers", f"must be distinct layers below num_hidden_layers = {num_layers}")
    return tuple(sorted(layers))


def _rope_layers(text: ConfigFields, num_layers: int) -> tuple[bool, ...]:
    uses_rope = text.integers("no_rope_layers")
    if uses_rope:
        if len(uses_rope) < num_layers or any(flag > 1 for flag in uses_rope):
            raise text.error("no_rope_layers", f"must hold a 0 or 1 for each of the {num_layers} layers")
        layers = tuple(flag == 1 for flag in uses_rope[:num_layers])
    else:
        interval = text.integer("no_rope_layer_interval", 4)
        layers = tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    _check_layer_types(text, layers)
    return layers


def _check_layer_types(text: ConfigFields, rope_layers: tuple[bool, ...]) -> None:
    """layer_types repeats what no_rope_layers says; a checkpoint where the two disagree is refused."""
    if not text.has("layer_types"):
        return
    expected = ["chunked_attention" if is_local else "full_attention" for is_local in rope_layers]
    found = text.raw["layer_types"]
    if not isinstance(found, list | tuple) or list(found[: len(expected)]) != expected:
        raise text.error("layer_types", f"contradicts no_rope_layers, by which it would be {expected}")


def _rope(text: ConfigFields) -> RopeConfig:
    """``rope_parameters`` (transformers 5) or ``rope_theta`` + ``rope_scaling`` (before)."""
    scaling = text.nested("rope_parameters") or text.nested("rope_scaling")
    default_theta = text.number("rope_theta", 500000.0, above=0.0)
    if scaling is None:
        return RopeConfig(theta=default_theta, scaling=None)
    theta = scaling.number("rope_theta", default_theta, above=0.0)
    kind_field = "rope_type" if scaling.has("rope_type") else "type"
    kind = scaling.text(kind_field, "default")
    if kind == "default":
        return RopeConfig(theta=theta, scaling=None)
    if kind != "llama3":
        raise scaling.error(kind_field, "only default and llama3 rope are supported")
    return RopeConfig(theta=theta, scaling=_llama3_scaling(scaling))


def _llama3_scaling(fields: ConfigFields) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=fields.number("factor", None, above=0.0),
        low_freq_factor=fields.number("low_freq_factor", None, above=0.0),
        high_freq_factor=fields.number("high_freq_factor", None, above=0.0),
        original_max_position_embeddings=fields.integer("original_max_position_embeddings", None),
    )
    # Equal factors are Scout's: a hard step instead of a ramp.
    if scaling.high_freq_factor < scaling.low_freq_factor:
        raise fields.error("high_freq_factor", f"must be >= low_freq_factor = {scaling.low_freq_factor:g}")
    return scaling


def _first_with(name: str, *sources: ConfigFields) -> ConfigFields:
    """Nested configs keep some fields outside text_config; the text part's own value comes first."""
    return next((fields for fields in sources if fields.has(name)), sources[0])


def _eos_token_ids(fields: ConfigFields, vocab_size: int) -> tuple[int, ...]:
    if isinstance(fields.raw.get("eos_token_id"), list | tuple):
        token_ids = fields.integers("eos_token_id") or ()
    else:
        token_id = fields.optional_integer("eos_token_id")
        token_ids = () if token_id is None else (token_id,)
    if any(token_id >= vocab_size for token_id in token_ids):
        raise fields.error("eos_token_id", f"must be below vocab_size = {vocab_size}")
    return token_ids


def _torch_dtype(text: ConfigFields, outer: ConfigFields) -> str | None:
    for fields in (text, outer):
        for name in ("torch_dtype", "dtype"):
            if fields.has(name):
                return fields.text(name, "")
    return None
