"""One step's input to the model: the tokens of every sequence in it, back to back, and the attention plans.

Shapes: T tokens of the step, L rows that want logits, M positions with given embeddings, D model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from router.attention_plan import AttentionPlan, AttentionPlanner, Heads, IntArray, Span
from router.config import ModelConfig
from router.kv_cache import NULL_BLOCK, KvGroup
from router.native.kernels import layer_kernels
from router.tile_plan import TilePlan, can_plan_tiles, plan_tiles

StepPlan = AttentionPlan | TilePlan
"""TilePlan where there are compiled kernels, AttentionPlan elsewhere."""


class InputEmbeddings(NamedTuple):
    """Embeddings that replace those of the token ids at some rows (image patches)."""

    rows_M: torch.Tensor
    values_MD: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSlice:
    """The part of a sequence that a step computes: ``token_ids`` at positions ``start``, ``start + 1``, ...

    Entry i of a block table covers positions i * block_size and on, the slice's own included; local entries before
    the chunk of ``start`` are never read. Logits are wanted from index ``logits_from`` of token_ids on: len - 1 for
    the last token only, len for none. ``embeddings.rows_M`` index token_ids.
    """

    token_ids: Sequence[int]
    start: int
    global_blocks: Sequence[int]
    local_blocks: Sequence[int]
    logits_from: int
    embeddings: InputEmbeddings | None = None

    def blocks(self, group: KvGroup) -> Sequence[int]:
        return self.global_blocks if group is KvGroup.GLOBAL else self.local_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of slice 0, then of slice 1, ... ``rope_positions_T`` count from the attention chunk's start."""

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    rope_positions_T: torch.Tensor
    global_plan: StepPlan
    local_plan: StepPlan
    logit_rows_L: torch.Tensor
    embeddings: InputEmbeddings | None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)


def build_batch(slices: Sequence[SequenceSlice], config: ModelConfig, block_size: int, device: torch.device) -> Batch:
    """``slices`` are of different sequences, each with at least one token."""
    assert slices, "a step computes something"
    assert all(len(part.token_ids) for part in slices), "a slice has at least one token"
    positions: list[int] = []
    token_ids: list[int] = []
    for part in slices:
        positions += range(part.start, part.start + len(part.token_ids))
        token_ids += part.token_ids
    positions_T = np.array(positions, dtype=np.int64)
    chunk = config.attention_chunk_size
    return Batch(
        token_ids_T=_to_device(np.array(token_ids, dtype=np.int64), device),
        positions_T=_to_device(positions_T, device),
        rope_positions_T=_to_device(positions_T if chunk is None else positions_T % chunk, device),
        global_plan=_plan(slices, KvGroup.GLOBAL, config, block_size, device),
        local_plan=_plan(slices, KvGroup.LOCAL, config, block_size, device),
        logit_rows_L=_to_device(_logit_rows(slices), device),
        embeddings=_embeddings(slices, device),
    )


def _plan(
    slices: Sequence[SequenceSlice], group: KvGroup, config: ModelConfig, block_size: int, device: torch.device
) -> StepPlan:
    chunk = config.attention_chunk_size if group is KvGroup.LOCAL else None
    heads = Heads(num_query_heads=config.num_attention_heads, num_kv_heads=config.num_key_value_heads)
    spans: list[Span] = []
    slots: list[int] = []
    for part, first_token in zip(slices, _first_rows(slices), strict=True):
        spans += _spans(part, first_token, group, chunk, block_size)
        slots += _slots(part, group, block_size)
    slots_T = np.array(slots, dtype=np.int64)
    kernels = layer_kernels() if device.type == "cpu" and can_plan_tiles(heads, config.head_dim) else None
    if kernels is not None:
        return plan_tiles(spans, slots_T, heads, kernels)
    planner = AttentionPlanner(heads=heads, head_dim=config.head_dim, block_size=block_size, device=device)
    return planner.plan(spans, slots_T)


def _spans(part: SequenceSlice, first_token: int, group: KvGroup, chunk: int | None, block_size: int) -> Iterator[Span]:
    """One span per attention chunk that the slice touches; without chunks, one."""
    position, end = part.start, part.start + len(part.token_ids)
    while position < end:
        origin = 0 if chunk is None else position // chunk * chunk
        stop = end if chunk is None else min(end, origin + chunk)
        yield Span(
            first_token=first_token + position - part.start,
            num_tokens=stop - position,
            start=position,
            origin=origin,
            blocks=part.blocks(group)[origin // block_size : -(-stop // block_size)],
        )
        position = stop


def _slots(part: SequenceSlice, group: KvGroup, block_size: int) -> Iterator[int]:
    """Where each of the slice's tokens is stored: block * block size + place in the block."""
    blocks = part.blocks(group)
    position, end = part.start, part.start + len(part.token_ids)
    while position < end:
        index = position // block_size
        assert blocks[index] != NULL_BLOCK, f"a token of the step has no {group.value} block"
        stop = min(end, (index + 1) * block_size)
        first = blocks[index] * block_size + position % block_size
        yield from range(first, first + stop - position)
        position = stop


def _first_rows(slices: Sequence[SequenceSlice]) -> list[int]:
    return list(accumulate((len(part.token_ids) for part in slices[:-1]), initial=0))


def _logit_rows(slices: Sequence[SequenceSlice]) -> IntArray:
    rows: list[int] = []
    for part, first_row in zip(slices, _first_rows(slices), strict=True):
        rows += range(first_row + part.logits_from, first_row + len(part.token_ids))
    return np.array(rows, dtype=np.int64)


def _embeddings(slices: Sequence[SequenceSlice], device: torch.device) -> InputEmbeddings | None:
    given = [
        InputEmbeddings(part.embeddings.rows_M + first_row, part.embeddings.values_MD)
        for part, first_row in zip(slices, _first_rows(slices), strict=True)
        if part.embeddings is not None
    ]
    if not given:
        return None
    rows, values = (torch.cat(parts).to(device) for parts in zip(*given, strict=True))
    return InputEmbeddings(rows, values)


def _to_device(array: IntArray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64, copy=False)).to(device)
