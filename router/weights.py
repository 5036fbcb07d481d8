"""The router's part of a checkpoint: everything but the routed experts.

Each matrix is read, laid out for its kernel and dropped before the next is read, so that a process's peak is its
weights plus the largest matrix. The LM head, by far the largest, comes first, while little else is in memory.

Shapes: V vocabulary, D model, E experts, and as in attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experts.checkpoint import Checkpoint
from experts.linear import PackedLinear, pack_linear
from experts.mlp import Mlp
from experts.progress import Progress
from experts.scratch import scratch_tensor
from router.attention import AttentionWeights
from router.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeWeights:
    gate_ED: PackedLinear
    shared_expert: Mlp


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    input_norm_D: torch.Tensor
    attention: AttentionWeights
    post_attention_norm_D: torch.Tensor
    feed_forward: Mlp | MoeWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    embedding_VD: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm_D: torch.Tensor
    lm_head_VD: PackedLinear


def router_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name, without the checkpoint's text prefix, and shape of every tensor a router reads."""
    tensors: dict[str, Shape] = {
        EMBEDDING: (config.vocab_size, config.hidden_size),
        FINAL_NORM: (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        tensors[LM_HEAD] = (config.vocab_size, config.hidden_size)
    for layer in range(config.num_hidden_layers):
        tensors |= _layer_tensors(config, layer)
    return tensors


def validate_router(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Checks all tensors from the files' headers. Raises CheckpointError for one that is missing or misshapen."""
    for name, shape in router_tensors(config).items():
        checkpoint.require(name, shape)


def load_router(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> ModelWeights:
    """Validates, then reads. Raises CheckpointError before any weight is read where a header can tell."""
    validate_router(checkpoint, config)
    reader = _Reader(checkpoint, config, dtype=dtype, device=device, progress=progress)
    lm_head_VD = reader.linear(EMBEDDING if config.tie_word_embeddings else LM_HEAD)
    embedding_VD = reader.tensor(EMBEDDING)
    layers = tuple(_load_layer(reader, config, layer) for layer in range(config.num_hidden_layers))
    return ModelWeights(
        embedding_VD=embedding_VD, layers=layers, norm_D=reader.tensor(FINAL_NORM), lm_head_VD=lm_head_VD
    )


class _Reader:
    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._total_bytes = sum(checkpoint.info(name).num_bytes for name in router_tensors(config))
        self._done: set[str] = set()
        self._done_bytes = 0

    def tensor(self, name: str) -> torch.Tensor:
        return self._read(name).to(self._device)

    def linear(self, *names: str) -> PackedLinear:
        """One layer of the rows of all the named matrices."""
        weights = [self._read(name) for name in names]
        if len(weights) == 1:
            return pack_linear(weights[0].to(self._device))
        num_rows = sum(len(weight) for weight in weights)
        joined = scratch_tensor((num_rows, weights[0].shape[1]), self._dtype)
        torch.cat(weights, out=joined)
        return pack_linear(joined.to(self._device))

    def mlp(self, prefix: str) -> Mlp:
        return Mlp(
            gate=self.linear(f"{prefix}.gate_proj.weight"),
            up=self.linear(f"{prefix}.up_proj.weight"),
            down=self.linear(f"{prefix}.down_proj.weight"),
        )

    def _read(self, name: str) -> torch.Tensor:
        weight = self._checkpoint.read(name, dtype=self._dtype)
        # Tied embeddings are read twice and counted once.
        if name not in self._done:
            self._done.add(name)
            self._done_bytes += self._checkpoint.info(name).num_bytes
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)
        return weight


def _load_layer(reader: _Reader, config: ModelConfig, layer: int) -> LayerWeights:
    prefix = f"model.layers.{layer}"
    feed_forward: Mlp | MoeWeights
    if layer in config.moe_layers:
        feed_forward = MoeWeights(
            gate_ED=reader.linear(f"{prefix}.feed_forward.router.weight"),
            shared_expert=reader.mlp(f"{prefix}.feed_forward.shared_expert"),
        )
    else:
        feed_forward = reader.mlp(f"{prefix}.feed_forward")
    return LayerWeights(
        input_norm_D=reader.tensor(f"{prefix}.input_layernorm.weight"),
        attention=AttentionWeights(
            qkv=reader.linear(*(f"{prefix}.self_attn.{kind}_proj.weight" for kind in "qkv")),
            output=reader.linear(f"{prefix}.self_attn.o_proj.weight"),
        ),
        post_attention_norm_D=reader.tensor(f"{prefix}.post_attention_layernorm.weight"),
        feed_forward=feed_forward,
    )


def _layer_tensors(config: ModelConfig, layer: int) -> dict[str, Shape]:
    prefix, hidden = f"model.layers.{layer}", config.hidden_size
    query_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    tensors: dict[str, Shape] = {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
        f"{prefix}.self_attn.q_proj.weight": (query_rows, hidden),
        f"{prefix}.self_attn.k_proj.weight": (kv_rows, hidden),
        f"{prefix}.self_attn.v_proj.weight": (kv_rows, hidden),
        f"{prefix}.self_attn.o_proj.weight": (hidden, query_rows),
    }
    feed_forward = f"{prefix}.feed_forward"
    if layer not in config.moe_layers:
        return tensors | _mlp_tensors(feed_forward, hidden, config.intermediate_size_mlp)
    tensors[f"{feed_forward}.router.weight"] = (config.num_local_experts, hidden)
    return tensors | _mlp_tensors(f"{feed_forward}.shared_expert", hidden, config.intermediate_size)


def _mlp_tensors(prefix: str, hidden: int, width: int) -> dict[str, Shape]:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }
