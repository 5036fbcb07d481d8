"""Paged keys and values, in two groups: global layers keep every position, local layers their current chunk.

The two groups have block pools and block tables of their own, because they keep different positions. Block 0 of
each group is the null block: all zeros, never written, what padding reads.

Shapes: B blocks, K KV heads, S positions per block, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from experts.resident import resident_tensor
from router.config import ModelConfig

NULL_BLOCK = 0


class KvGroup(Enum):
    GLOBAL = "global"
    LOCAL = "local"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheSpec:
    """How large a block is, for whoever decides how many of them fit."""

    config: ModelConfig
    dtype: torch.dtype
    block_size: int

    def layers(self, group: KvGroup) -> tuple[int, ...]:
        return self.config.global_layers if group is KvGroup.GLOBAL else self.config.local_layers

    def block_bytes(self, group: KvGroup) -> int:
        """Bytes of one block in all layers of the group."""
        numbers_per_layer = 2 * self.config.num_key_value_heads * self.block_size * self.config.head_dim
        return len(self.layers(group)) * numbers_per_layer * self.dtype.itemsize


class LayerKv:
    """Keys and values of one layer, [B, K, S, D] each."""

    def __init__(self, keys_BKSD: torch.Tensor, values_BKSD: torch.Tensor) -> None:
        self.keys_BKSD = keys_BKSD
        self.values_BKSD = values_BKSD

    @property
    def head_dim(self) -> int:
        return self.keys_BKSD.shape[-1]

    def write(self, rows: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> None:
        """Stores the tokens of a step. ``rows`` [T*K] numbers the [B*K*S] rows of D, token by token, head by head.

        Attention gives stale positions of a block weight zero, and zero times NaN is NaN: a NaN value is kept out,
        lest the block's next owner inherits it.
        """
        head_dim = k_TKD.shape[-1]
        self.keys_BKSD.view(-1, head_dim).index_copy_(0, rows, k_TKD.reshape(-1, head_dim))
        values = torch.nan_to_num(v_TKD.reshape(-1, head_dim))
        self.values_BKSD.view(-1, head_dim).index_copy_(0, rows, values)


class KvCache:
    """The blocks of all layers on one device, zeroed. ``num_*_blocks`` count the null block."""

    def __init__(
        self, spec: KvCacheSpec, *, num_global_blocks: int, num_local_blocks: int, device: torch.device
    ) -> None:
        self.spec = spec
        self.device = device
        num_blocks = {KvGroup.GLOBAL: num_global_blocks, KvGroup.LOCAL: num_local_blocks}
        self._layers = {layer: self._allocate(num_blocks[group]) for group in KvGroup for layer in spec.layers(group)}

    def layer(self, layer: int) -> LayerKv:
        return self._layers[layer]

    def _allocate(self, num_blocks: int) -> LayerKv:
        config = self.spec.config
        shape = (num_blocks, config.num_key_value_heads, self.spec.block_size, config.head_dim)
        keys, values = (self._zeros(shape) for _ in range(2))
        return LayerKv(keys, values)

    def _zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        if self.device.type == "cpu":
            return resident_tensor(shape, self.spec.dtype)
        return torch.zeros(shape, dtype=self.spec.dtype, device=self.device)
