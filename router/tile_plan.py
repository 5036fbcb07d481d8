"""What the compiled attention does in one step and KV group: the counterpart of attention_plan.py.

Spans are cut into tiles: runs of tokens whose query rows fit the kernel (router/native/attention.c).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from router.attention_plan import Heads, IntArray, Span
from router.kv_cache import LayerKv
from router.native.kernels import MAX_HEAD_DIM, MAX_TILE_ROWS, LayerKernels, PositionChanges


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePlan:
    """slots_T, tiles_N4 and tables are as LayerKernels takes them."""

    kernels: LayerKernels
    heads: Heads
    slots_T: IntArray
    tiles_N4: IntArray
    tables: IntArray

    def attend(self, projected_TP: torch.Tensor, kv: LayerKv, changes: PositionChanges) -> torch.Tensor:
        """Stores the step's keys and values and returns what its queries [T, H * A] find."""
        q_TP = self.kernels.position(projected_TP, self.heads.num_query_heads, kv, self.slots_T, changes)
        return self.kernels.attend(q_TP, self.heads.num_query_heads, kv, self.tiles_N4, self.tables)


def can_plan_tiles(heads: Heads, head_dim: int) -> bool:
    return heads.group_size <= MAX_TILE_ROWS and head_dim <= MAX_HEAD_DIM


def plan_tiles(spans: Sequence[Span], slots_T: IntArray, heads: Heads, kernels: LayerKernels) -> TilePlan:
    tokens_per_tile = MAX_TILE_ROWS // heads.group_size
    tiles: list[tuple[int, int, int, int]] = []
    tables: list[int] = []
    for span in spans:
        num_visible = span.start - span.origin + 1
        for offset in range(0, span.num_tokens, tokens_per_tile):
            num_tokens = min(tokens_per_tile, span.num_tokens - offset)
            tiles.append((span.first_token + offset, num_tokens, num_visible + offset, len(tables)))
        tables += span.blocks
    return TilePlan(
        kernels=kernels,
        heads=heads,
        slots_T=slots_T,
        tiles_N4=np.array(tiles, dtype=np.int64),
        tables=np.array(tables, dtype=np.int64),
    )
