"""Paged attention against dense attention, and what the plan promises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from router import attention_plan
from router.attention_plan import AttentionPlan, AttentionPlanner, Heads, Span
from router.kv_cache import LayerKv
from router.paged_attention import AttentionOutput, attend

BLOCK = 16
HEAD_DIM = 32
CPU = torch.device("cpu")


class Paged:
    """Keys and values of one sequence per span, at scattered blocks, and random queries."""

    def __init__(self, heads: Heads, lengths: Sequence[int], *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.heads = heads
        self.keys = [torch.randn(n, heads.num_kv_heads, HEAD_DIM, generator=generator) for n in lengths]
        self.values = [torch.randn(n, heads.num_kv_heads, HEAD_DIM, generator=generator) for n in lengths]
        self.queries = [torch.randn(n, heads.num_query_heads, HEAD_DIM, generator=generator) for n in lengths]
        counts = [-(-n // BLOCK) for n in lengths]
        free = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
        self.tables = [[free.pop() for _ in range(count)] for count in counts]
        shape = (sum(counts) + 1, heads.num_kv_heads, BLOCK, HEAD_DIM)
        self.kv = LayerKv(torch.zeros(shape), torch.zeros(shape))

    def plan(self, spans: Sequence[Span]) -> AttentionPlan:
        planner = AttentionPlanner(heads=self.heads, head_dim=HEAD_DIM, block_size=BLOCK, device=CPU)
        slots = [
            s.blocks[(p - s.origin) // BLOCK] * BLOCK + p % BLOCK
            for s in spans
            for p in range(s.start, s.start + s.num_tokens)
        ]
        return planner.plan(spans, np.array(slots))

    def span(self, sequence: int, start: int, stop: int, *, first_token: int = 0, origin: int = 0) -> Span:
        blocks = self.tables[sequence][origin // BLOCK :]
        return Span(first_token=first_token, num_tokens=stop - start, start=start, origin=origin, blocks=blocks)

    def attend(self, work: Sequence[tuple[int, int, int]]) -> list[AttentionOutput]:
        """Stores and attends ``(sequence, start, stop)`` runs in one step; one output per run."""
        firsts = np.cumsum([0, *(stop - start for _, start, stop in work)])
        spans = [self.span(*run, first_token=int(first)) for run, first in zip(work, firsts[:-1], strict=True)]
        plan = self.plan(spans)
        q, k, v = (
            torch.cat([parts[sequence][start:stop] for sequence, start, stop in work])
            for parts in (self.queries, self.keys, self.values)
        )
        self.kv.write(plan.kv_rows, k, v)
        out = attend(q, self.kv, plan)
        return [AttentionOutput(*(part[a:b] for part in out)) for a, b in pairwise(firsts)]

    def dense(self, sequence: int) -> AttentionOutput:
        group = self.heads.group_size
        k, v = (parts[sequence].repeat_interleave(group, dim=1) for parts in (self.keys, self.values))
        scores = torch.einsum("qhd,khd->hqk", self.queries[sequence], k) / math.sqrt(HEAD_DIM)
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
        return AttentionOutput(
            torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1).transpose(0, 1)
        )


@pytest.mark.parametrize("heads", [(1, 1), (5, 1), (6, 6), (8, 2), (40, 8)])
def test_paged_attention_equals_dense_attention(heads: tuple[int, int]) -> None:
    paged = Paged(Heads(num_query_heads=heads[0], num_kv_heads=heads[1]), [600, 37, 300])
    steps = [[(0, 0, 290), (1, 0, 37)], [(0, 290, 291), (2, 0, 257)], [(2, 257, 300), (0, 291, 600)]]
    outputs: list[list[AttentionOutput]] = [[], [], []]
    for work in steps:
        for (sequence, _, _), output in zip(work, paged.attend(work), strict=True):
            outputs[sequence].append(output)
    for sequence, parts in enumerate(outputs):
        dense = paged.dense(sequence)
        torch.testing.assert_close(torch.cat([p.out_THD for p in parts]), dense.out_THD, rtol=0, atol=2e-6)
        log_sum_exp = torch.cat([p.log_sum_exp_TH for p in parts])
        torch.testing.assert_close(log_sum_exp, dense.log_sum_exp_TH, rtol=0, atol=2e-6)


def test_outputs_over_disjoint_keys_merge_by_their_log_sum_exp() -> None:
    paged = Paged(Heads(num_query_heads=4, num_kv_heads=2), [600])
    whole = paged.attend([(0, 0, 600)])[0]
    q = paged.queries[0][599:600]
    plans = [
        paged.plan([paged.span(0, 255, 256)]),
        paged.plan([replace(paged.span(0, 599, 600), origin=256, blocks=paged.tables[0][256 // BLOCK :])]),
    ]
    parts = [attend(q, paged.kv, plan) for plan in plans]
    weights = torch.stack([part.log_sum_exp_TH for part in parts]).softmax(0)[..., None]
    merged = sum(weight * part.out_THD for weight, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(merged, whole.out_THD[599:600], rtol=0, atol=2e-6)


def test_a_split_in_which_a_row_sees_nothing_changes_no_bit() -> None:
    paged = Paged(Heads(num_query_heads=8, num_kv_heads=2), [40])
    paged.attend([(0, 0, 40)])
    plan = paged.plan([paged.span(0, 20, 21)])
    alone = attend(paged.queries[0][20:21], paged.kv, plan)
    split = plan.batches[0].splits[0]
    unseen = replace(split, block_rows=torch.roll(split.block_rows, 1), hidden=torch.ones_like(split.hidden))
    padded = replace(plan, batches=(replace(plan.batches[0], splits=(split, unseen, unseen)),))
    merged = attend(paged.queries[0][20:21], paged.kv, padded)
    assert torch.equal(merged.out_THD, alone.out_THD)
    assert torch.equal(merged.log_sum_exp_TH, alone.log_sum_exp_TH)


def test_not_a_number_left_in_a_block_does_not_reach_its_next_owner() -> None:
    paged = Paged(Heads(num_query_heads=4, num_kv_heads=2), [3])
    clean = paged.attend([(0, 0, 3)])[0]
    rows = torch.arange(paged.kv.keys_BKSD.numel() // HEAD_DIM)[-2 * BLOCK :]
    poison = torch.full((BLOCK, 2, HEAD_DIM), float("nan"))
    paged.kv.write(rows, poison, poison)
    assert torch.equal(paged.attend([(0, 0, 3)])[0].out_THD, clean.out_THD)


def test_decode_tokens_share_a_batch_and_prefill_stands_apart() -> None:
    paged = Paged(Heads(num_query_heads=8, num_kv_heads=2), [40, 500, 90, 77])
    spans = [
        paged.span(0, 39, 40, first_token=0),
        paged.span(1, 0, 64, first_token=1),
        paged.span(2, 89, 90, first_token=65),
        paged.span(3, 76, 77, first_token=66),
    ]
    batches = paged.plan(spans).batches
    assert [(batch.num_tiles, batch.num_rows) for batch in batches] == [(1, 256), (3, 8)]


def test_a_short_tile_drops_out_of_the_splits_it_does_not_reach() -> None:
    paged = Paged(Heads(num_query_heads=8, num_kv_heads=2), [1000, 90])
    spans = [paged.span(1, 89, 90, first_token=0), paged.span(0, 999, 1000, first_token=1)]
    (batch,) = paged.plan(spans).batches
    assert [split.num_tiles for split in batch.splits] == [2, *[1] * 7]
    assert [split.hidden is None for split in batch.splits] == [False, *[True] * 6, False]
    assert batch.splits[0].first_masked == 1


def test_no_matmul_has_a_single_matrix() -> None:
    paged = Paged(Heads(num_query_heads=4, num_kv_heads=1), [600, 300])
    spans = [paged.span(0, 599, 600, first_token=0), paged.span(1, 0, 300, first_token=1)]
    batches = paged.plan(spans).batches
    assert len(batches) == 3
    assert all(batch.num_tiles >= 2 for batch in batches)
    assert all(split.num_tiles >= 2 for batch in batches for split in batch.splits)


def test_scores_and_masks_of_a_long_prefill_are_bounded() -> None:
    heads = Heads(num_query_heads=40, num_kv_heads=8)
    blocks = range(1, 8192 // BLOCK + 1)
    span = Span(first_token=0, num_tokens=8192, start=0, origin=0, blocks=blocks)
    planner = AttentionPlanner(heads=heads, head_dim=128, block_size=BLOCK, device=CPU)
    positions = np.arange(8192)
    plan = planner.plan([span], positions + BLOCK)
    size = plan.positions_per_split
    scores = [batch.num_tiles * heads.num_kv_heads * batch.num_rows * size for batch in plan.batches]
    assert max(scores) <= attention_plan.MAX_BATCH_NUMBERS
    masks = [split.hidden for batch in plan.batches for split in batch.splits if split.hidden is not None]
    # A tile needs a mask in at most two of its up to 64 splits; masks for all would take 170 MB.
    assert sum(mask.numel() for mask in masks) < 30e6


def test_every_token_and_head_has_an_output_row_of_its_own() -> None:
    paged = Paged(Heads(num_query_heads=10, num_kv_heads=2), [700, 90])
    spans = [paged.span(0, 0, 700, first_token=0), paged.span(1, 50, 90, first_token=700)]
    plan = paged.plan(spans)
    assert len(set(plan.output_rows.tolist())) == 740 * 10
