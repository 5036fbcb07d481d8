"""Checkpoints with the exact tensors of the published models and holes for weights, built from parameters.

Names and shapes are those of llama4.md §4.1, written down again here: they are what the loaders are held to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.checkpoints.safetensors_writer import TensorSpec, header_of

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedModel:
    """The shape of a nested ``llama4`` model: every ``moe_step``-th layer has experts, the others are dense."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    moe_step: int = 1
    num_heads: int = 40
    num_kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 202048
    vision: bool = True

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(range(self.moe_step - 1, self.num_layers, self.moe_step))

    @property
    def config(self) -> dict[str, Any]:
        text = {
            "model_type": "llama4_text",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "intermediate_size_mlp": 16384,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_local_experts": self.num_experts,
            "interleave_moe_layer_step": self.moe_step,
            "vocab_size": self.vocab_size,
        }
        return {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "text_config": text,
            "torch_dtype": "bfloat16",
        }


SCOUT = PublishedModel(num_layers=48, hidden_size=5120, intermediate_size=8192, num_experts=16)
MAVERICK = PublishedModel(num_layers=48, hidden_size=5120, intermediate_size=8192, num_experts=128, moe_step=2)
BEHEMOTH = PublishedModel(
    num_layers=88, hidden_size=16384, intermediate_size=26624, num_experts=16, num_heads=128, vision=False
)


def tensor_shapes(model: PublishedModel) -> dict[str, tuple[int, ...]]:
    """Every tensor by its full name, in the order of the layers."""
    shapes = {f"language_model.{name}": shape for name, shape in _text_shapes(model)}
    if model.vision:
        shapes |= dict(_vision_shapes(model))
    return shapes


def write_sparse(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], shard_bytes: int = SHARD_BYTES
) -> None:
    """A sharded checkpoint folder whose files have headers and sizes but hold no data on disk."""
    folder.mkdir(parents=True)
    specs = [TensorSpec(name=name, shape=shape, dtype="BF16") for name, shape in shapes.items()]
    shards = _split(specs, shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update({spec.name: file_name for spec in shard})
        header = header_of(shard)
        with (folder / file_name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(spec.num_bytes for spec in shard))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def _split(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(other.num_bytes for other in shards[-1]) + spec.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    return shards


def _text_shapes(model: PublishedModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = model.hidden_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    yield "model.embed_tokens.weight", (model.vocab_size, width)
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (width,)
        yield f"{prefix}post_attention_layernorm.weight", (width,)
        yield f"{prefix}self_attn.q_proj.weight", (queries, width)
        yield f"{prefix}self_attn.k_proj.weight", (keys, width)
        yield f"{prefix}self_attn.v_proj.weight", (keys, width)
        yield f"{prefix}self_attn.o_proj.weight", (width, queries)
        yield from _feed_forward_shapes(model, layer, f"{prefix}feed_forward.")
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (model.vocab_size, width)


def _feed_forward_shapes(model: PublishedModel, layer: int, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, hidden, experts = model.hidden_size, model.intermediate_size, model.num_experts
    if layer not in model.moe_layers:
        yield from _mlp_shapes(prefix, width, 16384)
        return
    yield f"{prefix}router.weight", (experts, width)
    yield f"{prefix}experts.gate_up_proj", (experts, width, 2 * hidden)
    yield f"{prefix}experts.down_proj", (experts, hidden, width)
    yield from _mlp_shapes(f"{prefix}shared_expert.", width, hidden)


def _mlp_shapes(prefix: str, width: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}gate_proj.weight", (hidden, width)
    yield f"{prefix}up_proj.weight", (hidden, width)
    yield f"{prefix}down_proj.weight", (width, hidden)


def _vision_shapes(model: PublishedModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "multi_modal_projector.linear_1.weight", (model.hidden_size, 4096)
    yield "vision_model.class_embedding", (1408,)
    yield "vision_model.positional_embedding_vlm", (577, 1408)
    yield "vision_model.patch_embedding.linear.weight", (1408, 588)
    for norm in ("layernorm_pre", "layernorm_post"):
        yield from _affine_shapes(f"vision_model.{norm}", (1408,))
    for layer in range(34):
        prefix = f"vision_model.model.layers.{layer}."
        yield from _affine_shapes(f"{prefix}input_layernorm", (1408,))
        yield from _affine_shapes(f"{prefix}post_attention_layernorm", (1408,))
        for projection in "qkvo":
            yield from _affine_shapes(f"{prefix}self_attn.{projection}_proj", (1408, 1408))
        yield from _affine_shapes(f"{prefix}mlp.fc1", (5632, 1408))
        yield from _affine_shapes(f"{prefix}mlp.fc2", (1408, 5632))
    yield "vision_model.vision_adapter.mlp.fc1.weight", (4096, 5632)
    yield "vision_model.vision_adapter.mlp.fc2.weight", (4096, 4096)


def _affine_shapes(prefix: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.weight", shape
    yield f"{prefix}.bias", shape[:1]
