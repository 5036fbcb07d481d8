"""Random weights for a text model of any shape, made tensor by tensor in pieces of bounded size.

Every tensor has its own random stream, drawn from the seed and its name, so its values do not depend on the
order of writing or on how the tensors are spread over files.

Shapes: E experts, D model width, F hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch

from cluster.checkpoints.expert_skew import ExpertSkew
from cluster.checkpoints.safetensors_writer import TensorSpec, write_checkpoint_tensors
from experts.progress import Progress

PIECE_ELEMENTS = 4 * 2**20
DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}


class Role(Enum):
    """What a tensor does with the residual stream; initialisation and skew depend on it."""

    NORM = "norm"
    EMBEDDING = "embedding"
    READ = "read"
    WRITE = "write"
    GATE = "gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Initialization:
    """Standard deviations. ``weight_std`` None scales each matrix by its fan-in, so that activations stay near 1.

    ``max_rms`` bounds the root mean square of the residual stream; the skewed gate is sized by it.
    """

    weight_std: float | None
    norm_std: float
    max_rms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One tensor of the model; ``moe_index`` counts the MoE layers from 0 and is set for gates only."""

    spec: TensorSpec
    role: Role
    fan_in: int = 1
    moe_index: int | None = None


def moe_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The decoder layers with experts, explicit or by the interleaving step."""
    explicit = config.get("moe_layers")
    if explicit is not None:
        return tuple(explicit)
    step = config["interleave_moe_layer_step"]
    return tuple(range(step - 1, config["num_hidden_layers"], step))


def plan_weights(config: Mapping[str, Any]) -> tuple[Weight, ...]:
    """Every tensor of a ``llama4_text`` model with the published names, layer by layer."""
    plan = _Plan(DTYPES[config["torch_dtype"]][0])
    width, vocab_size = config["hidden_size"], config["vocab_size"]
    plan.add("model.embed_tokens.weight", (vocab_size, width), Role.EMBEDDING)
    sparse = moe_layers(config)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        plan.add(f"{prefix}.input_layernorm.weight", (width,), Role.NORM)
        _plan_attention(plan, f"{prefix}.self_attn", config)
        plan.add(f"{prefix}.post_attention_layernorm.weight", (width,), Role.NORM)
        if layer in sparse:
            _plan_experts(plan, f"{prefix}.feed_forward", config, sparse.index(layer))
        else:
            _plan_mlp(plan, f"{prefix}.feed_forward", width, config["intermediate_size_mlp"])
    plan.add("model.norm.weight", (width,), Role.NORM)
    if not config["tie_word_embeddings"]:
        plan.add("lm_head.weight", (vocab_size, width), Role.READ, fan_in=width)
    return tuple(plan.weights)


def write_random_weights(
    folder: Path,
    config: Mapping[str, Any],
    initialization: Initialization,
    *,
    seed: int,
    skew: ExpertSkew | None,
    max_shard_bytes: int,
    progress: Progress | None = None,
) -> None:
    """Writes all tensors of the model into ``folder``. Raises ValueError if the skew does not fit the model."""
    weights = plan_weights(config)
    maker = _WeightMaker(config, initialization, seed=seed, skew=skew)
    by_name = {weight.spec.name: weight for weight in weights}
    write_checkpoint_tensors(
        folder,
        [weight.spec for weight in weights],
        lambda name: maker.pieces(by_name[name]),
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )


class _Plan:
    """Collects weights of one dtype."""

    def __init__(self, dtype: str) -> None:
        self.weights: list[Weight] = []
        self._dtype = dtype

    def add(
        self, name: str, shape: tuple[int, ...], role: Role, *, fan_in: int = 1, moe_index: int | None = None
    ) -> None:
        spec = TensorSpec(name=name, shape=shape, dtype=self._dtype)
        self.weights.append(Weight(spec=spec, role=role, fan_in=fan_in, moe_index=moe_index))


def _plan_attention(plan: _Plan, prefix: str, config: Mapping[str, Any]) -> None:
    width, head_dim = config["hidden_size"], config["head_dim"]
    query_width = config["num_attention_heads"] * head_dim
    key_width = config["num_key_value_heads"] * head_dim
    plan.add(f"{prefix}.q_proj.weight", (query_width, width), Role.READ, fan_in=width)
    plan.add(f"{prefix}.k_proj.weight", (key_width, width), Role.READ, fan_in=width)
    plan.add(f"{prefix}.v_proj.weight", (key_width, width), Role.READ, fan_in=width)
    plan.add(f"{prefix}.o_proj.weight", (width, query_width), Role.WRITE, fan_in=query_width)


def _plan_mlp(plan: _Plan, prefix: str, width: int, hidden: int) -> None:
    plan.add(f"{prefix}.gate_proj.weight", (hidden, width), Role.READ, fan_in=width)
    plan.add(f"{prefix}.up_proj.weight", (hidden, width), Role.READ, fan_in=width)
    plan.add(f"{prefix}.down_proj.weight", (width, hidden), Role.WRITE, fan_in=hidden)


def _plan_experts(plan: _Plan, prefix: str, config: Mapping[str, Any], moe_index: int) -> None:
    width, hidden, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    plan.add(f"{prefix}.router.weight", (experts, width), Role.GATE, fan_in=width, moe_index=moe_index)
    # The fused expert tensors are [in, out], unlike every other matrix.
    plan.add(f"{prefix}.experts.gate_up_proj", (experts, width, 2 * hidden), Role.READ, fan_in=width)
    plan.add(f"{prefix}.experts.down_proj", (experts, hidden, width), Role.WRITE, fan_in=hidden)
    _plan_mlp(plan, f"{prefix}.shared_expert", width, hidden)


class _WeightMaker:
    """Draws the values. With a skew, channels 0 to L-1 of the residual stream belong to the L MoE layers."""

    def __init__(
        self,
        config: Mapping[str, Any],
        initialization: Initialization,
        *,
        seed: int,
        skew: ExpertSkew | None,
    ) -> None:
        self._initialization = initialization
        self._dtype = DTYPES[config["torch_dtype"]][1]
        self._width: int = config["hidden_size"]
        self._num_layers: int = config["num_hidden_layers"]
        self._num_moe_layers = len(moe_layers(config))
        self._seed = seed
        self._skew = skew
        if skew is not None:
            _check_skew(skew, config, self._num_moe_layers)

    def pieces(self, weight: Weight) -> Iterator[torch.Tensor]:
        """The tensor in runs of whole rows of its first axis, at most PIECE_ELEMENTS each or one row."""
        shape = weight.spec.shape
        generator = torch.Generator().manual_seed(_stream_seed(self._seed, weight.spec.name))
        rows_per_piece = max(1, PIECE_ELEMENTS // prod(shape[1:]))
        mean = 1.0 if weight.role is Role.NORM else 0.0
        std = self._std(weight)
        for start in range(0, shape[0], rows_per_piece):
            piece = torch.empty(min(rows_per_piece, shape[0] - start), *shape[1:])
            piece.normal_(mean, std, generator=generator)
            if self._skew is not None:
                self._shape_skew(self._skew, weight, piece, first_row=start)
            yield piece.to(self._dtype)

    def _std(self, weight: Weight) -> float:
        if weight.role is Role.NORM:
            return self._initialization.norm_std
        if self._initialization.weight_std is not None:
            return self._initialization.weight_std
        if weight.role is Role.WRITE:
            # Two writes per layer, kept small together as GPT-2 does: with more, the attention's averages
            # make all tokens alike and the gate sends most of them to few experts.
            return 1 / sqrt(weight.fan_in * 2 * self._num_layers)
        return 1 / sqrt(weight.fan_in)

    def _shape_skew(self, skew: ExpertSkew, weight: Weight, piece: torch.Tensor, *, first_row: int) -> None:
        """Changes the layers' own channels of one piece in place; the idea is told in expert_skew.py."""
        channels = range(self._num_moe_layers)
        if weight.role is Role.EMBEDDING:
            token_ids = range(first_row, first_row + len(piece))
            hot_VL = [[skew.is_hot(token_id, index) for index in channels] for token_id in token_ids]
            piece[:, : len(channels)] = torch.tensor(hot_VL) * 2.0 - 1.0
        elif weight.role is Role.WRITE and piece.dim() == 3:
            piece[:, :, : len(channels)] = 0.0
        elif weight.role is Role.WRITE:
            piece[: max(0, len(channels) - first_row)] = 0.0
        elif weight.role is Role.GATE and weight.moe_index is not None:
            # All gates are small: they come in one piece. 12 logits' standard deviations outweigh any tie.
            margin = 12 * self._std(weight) * sqrt(self._width) * self._initialization.max_rms
            piece[: skew.num_hot_experts, weight.moe_index] = margin


def _check_skew(skew: ExpertSkew, config: Mapping[str, Any], num_moe_layers: int) -> None:
    if skew.num_hot_experts > config["num_local_experts"]:
        raise ValueError(
            f"expert_skew: {skew.num_hot_experts} hot experts, the model has {config['num_local_experts']}"
        )
    if num_moe_layers > config["hidden_size"]:
        raise ValueError(
            f"expert_skew: needs a channel for each of {num_moe_layers} MoE layers, "
            f"hidden_size is {config['hidden_size']}"
        )


def _stream_seed(seed: int, name: str) -> int:
    digest = blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
