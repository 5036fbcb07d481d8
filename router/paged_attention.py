"""Paged attention in one form for prefill and decode, so that a row's bits do not depend on its company.

The query heads that share a KV head are rows of one matrix: grouped-query attention is a batched matmul over
(tile, KV head). Scores and sums are float32 whatever the cache holds. KV splits are merged online; a split in which
a row sees nothing leaves its sums exactly as they were (its weights are exp(-inf) = 0, its correction exp(0) = 1).
Plain torch operations only: each of them is row-independent on a CPU in the shapes of AttentionPlan.

Shapes: T tokens, H query heads, D head_dim, M = N * K matrices (tile, KV head), R query rows, P split positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from router.attention_plan import AttentionPlan, Split, TileBatch
from router.kv_cache import LayerKv


class AttentionOutput(NamedTuple):
    """Both float32. With the log of the softmax's denominator, outputs over disjoint KV can be merged."""

    out_THD: torch.Tensor
    log_sum_exp_TH: torch.Tensor


class _Softmax(NamedTuple):
    """A softmax-weighted sum under way: maximum so far, denominator, weighted sum of values."""

    max_MR1: torch.Tensor
    sum_MR1: torch.Tensor
    out_MRD: torch.Tensor


def attend(q_THD: torch.Tensor, kv: LayerKv, plan: AttentionPlan) -> AttentionOutput:
    """Causal attention of the step's queries to what ``kv`` holds, the step's own keys and values included.

    Queries carry their temperature already; scaling by D ** -0.5 happens here.
    """
    num_tokens, num_heads, head_dim = q_THD.shape
    queries = (q_THD.float() * head_dim**-0.5).reshape(-1, head_dim)
    done = [_attend_batch(queries, kv, batch, plan) for batch in plan.batches]
    out = torch.cat([(softmax.out_MRD / softmax.sum_MR1).flatten(0, 1) for softmax in done])
    log_sum_exp = torch.cat([(softmax.max_MR1 + softmax.sum_MR1.log()).flatten() for softmax in done])
    return AttentionOutput(
        out.index_select(0, plan.output_rows).view(num_tokens, num_heads, head_dim),
        log_sum_exp.index_select(0, plan.output_rows).view(num_tokens, num_heads),
    )


def _attend_batch(queries: torch.Tensor, kv: LayerKv, batch: TileBatch, plan: AttentionPlan) -> _Softmax:
    num_matrices = batch.num_tiles * plan.heads.num_kv_heads
    q_MRD = queries.index_select(0, batch.query_rows).view(num_matrices, batch.num_rows, -1)
    softmax = _attend_split(q_MRD, kv, batch.splits[0], plan, None)
    for split in batch.splits[1:]:
        active = split.num_tiles * plan.heads.num_kv_heads
        before = _Softmax(*(part[:active] for part in softmax))
        after = _attend_split(q_MRD[:active], kv, split, plan, before)
        for old, new in zip(before, after, strict=True):
            old.copy_(new)
    return softmax


def _attend_split(
    q_MRD: torch.Tensor, kv: LayerKv, split: Split, plan: AttentionPlan, before: _Softmax | None
) -> _Softmax:
    """The sums of ``before`` and this split together. Every row sees something in its first split."""
    scores_MRP = torch.bmm(q_MRD, _gather(kv.keys_BKSD, split, plan).transpose(1, 2))
    _hide(scores_MRP, split, plan.heads.num_kv_heads)
    max_MR1 = scores_MRP.amax(dim=-1, keepdim=True)
    if before is not None:
        max_MR1 = torch.maximum(max_MR1, before.max_MR1)
    weights_MRP = scores_MRP.sub_(max_MR1).exp_()
    sum_MR1 = weights_MRP.sum(dim=-1, keepdim=True)
    out_MRD = torch.bmm(weights_MRP, _gather(kv.values_BKSD, split, plan))
    if before is not None:
        correction_MR1 = (before.max_MR1 - max_MR1).exp_()
        sum_MR1 += before.sum_MR1 * correction_MR1
        out_MRD += before.out_MRD * correction_MR1
    return _Softmax(max_MR1, sum_MR1, out_MRD)


def _gather(cache_BKSD: torch.Tensor, split: Split, plan: AttentionPlan) -> torch.Tensor:
    """float32 [M, P, D]: the split's positions of every active tile and KV head, block by block."""
    rows = cache_BKSD.flatten(0, 1).flatten(1)
    positions = rows.index_select(0, split.block_rows)
    return positions.view(-1, plan.positions_per_split, cache_BKSD.shape[-1]).float()


def _hide(scores_MRP: torch.Tensor, split: Split, num_kv_heads: int) -> None:
    if split.hidden is None:
        return
    masked_MRP = scores_MRP[split.first_masked * num_kv_heads :]
    masked_MRP.view(-1, num_kv_heads, *scores_MRP.shape[1:]).masked_fill_(split.hidden, float("-inf"))
