"""One step's input to the model: the tokens of every sequence in it, back to back, and the attention plans.

Shapes: T tokens of the step, L rows that want logits, M positions with given embeddings, D model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from router.attention_plan import AttentionPlan, AttentionPlanner, Heads, IntArray, Span
from router.config import ModelConfig
from router.kv_cache import NULL_BLOCK, KvGroup


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
    global_plan: AttentionPlan
    local_plan: AttentionPlan
    logit_rows_L: torch.Tensor
    embeddings: InputEmbeddings | None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)


def build_batch(slices: Sequence[SequenceSlice], config: ModelConfig, block_size: int, device: torch.device) -> Batch:
    """``slices`` are of different sequences, each with at least one token."""
    assert slices, "a step computes something"
    assert all(len(part.token_ids) for part in slices), "a slice has at least one token"
    positions_T = np.concatenate([np.arange(part.start, part.start + len(part.token_ids)) for part in slices])
    chunk = config.attention_chunk_size
    return Batch(
        token_ids_T=_to_device(np.concatenate([np.asarray(part.token_ids) for part in slices]), device),
        positions_T=_to_device(positions_T, device),
        rope_positions_T=_to_device(positions_T if chunk is None else positions_T % chunk, device),
        global_plan=_plan(slices, KvGroup.GLOBAL, positions_T, config, block_size, device),
        local_plan=_plan(slices, KvGroup.LOCAL, positions_T, config, block_size, device),
        logit_rows_L=_to_device(_logit_rows(slices), device),
        embeddings=_embeddings(slices, device),
    )


def _plan(
    slices: Sequence[SequenceSlice],
    group: KvGroup,
    positions_T: IntArray,
    config: ModelConfig,
    block_size: int,
    device: torch.device,
) -> AttentionPlan:
    chunk = config.attention_chunk_size if group is KvGroup.LOCAL else None
    planner = AttentionPlanner(
        heads=Heads(num_query_heads=config.num_attention_heads, num_kv_heads=config.num_key_value_heads),
        head_dim=config.head_dim,
        block_size=block_size,
        device=device,
    )
    first_tokens = _first_rows(slices)
    spans = [
        span
        for part, first_token in zip(slices, first_tokens, strict=True)
        for span in _spans(part, first_token, group, chunk, block_size)
    ]
    kv_blocks_T = np.concatenate([_blocks_of_tokens(part, group, block_size) for part in slices])
    assert (kv_blocks_T != NULL_BLOCK).all(), f"a token of the step has no {group.value} block"
    return planner.plan(spans, positions_T, kv_blocks_T)


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


def _blocks_of_tokens(part: SequenceSlice, group: KvGroup, block_size: int) -> IntArray:
    """The block of each of the slice's tokens."""
    first_block = part.start // block_size
    end = part.start + len(part.token_ids)
    blocks = np.asarray(part.blocks(group)[first_block : -(-end // block_size)], dtype=np.int64)
    return blocks[np.arange(part.start, end) // block_size - first_block]


def _first_rows(slices: Sequence[SequenceSlice]) -> list[int]:
    lengths = [len(part.token_ids) for part in slices]
    return [0, *np.cumsum(lengths[:-1]).tolist()]


def _logit_rows(slices: Sequence[SequenceSlice]) -> IntArray:
    rows = [
        np.arange(first_row + part.logits_from, first_row + len(part.token_ids))
        for part, first_row in zip(slices, _first_rows(slices), strict=True)
    ]
    return np.concatenate(rows)


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
