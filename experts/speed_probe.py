"""Measures how fast a shard computes: once, when it has loaded."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from experts.mlp import Expert
from experts.shard import Shard
from experts.shard_speed import TILE_ROWS, ShardSpeed

# Experts computed one after the other: the weights of the first are out of the cache when its turn comes again.
_MAX_EXPERTS = 8
_ROUNDS = 3


def measure_speed(shard: Shard, *, flops_per_row: int) -> ShardSpeed | None:
    """Computes one row with up to 8 of the shard's experts, and a tile with one, three times each. The best time
    counts: whatever else runs on the machine only makes it longer. flops_per_row: of one expert. None for a shard
    without experts."""
    experts = shard.experts[:_MAX_EXPERTS]
    if not experts:
        return None
    row_s = _best_time(experts, _rows(shard, 1)) / len(experts)
    tile_s = _best_time(experts[:1], _rows(shard, TILE_ROWS))
    num_bytes = experts[0].num_bytes
    return ShardSpeed(bytes_per_s=num_bytes / row_s, flops_per_s=TILE_ROWS * flops_per_row / tile_s)


def _best_time(experts: Sequence[Expert], x_RD: torch.Tensor) -> float:
    return min(_time(experts, x_RD) for _ in range(_ROUNDS))


@torch.inference_mode()
def _time(experts: Sequence[Expert], x_RD: torch.Tensor) -> float:
    _finish(x_RD.device)
    started_at = time.perf_counter()
    for expert in experts:
        expert(x_RD)
    _finish(x_RD.device)
    return time.perf_counter() - started_at


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rows(shard: Shard, num_rows: int) -> torch.Tensor:
    return torch.ones(num_rows, shard.hidden_size, dtype=shard.dtype, device=shard.device)
