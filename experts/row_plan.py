"""Which row goes where: the permutation between tokens and routed rows, as numbers.

Every (token, expert) pair, a copy of the token, becomes one routed row. The rows of one expert are contiguous, within
an expert by token; experts come in ascending order, or in one that the caller names, such as shard by shard, where
an expert that several shards compute comes several times:

    tokens   t0 -> e2, e0     t1 -> e2          rows   e0: t0 | e2: t0 t1
                                                spans  (0, 0, 1)  (2, 1, 3)

What is done row by row is numpy's, what is done span by span is plain Python: at the sizes of a decode step, each
library that a dispatch touches costs more for being fetched into the caches than for what it computes.

Shapes: T tokens, K top-k, R = T * K routed rows, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Indices = npt.NDArray[np.int64]


class ExpertSpan(NamedTuple):
    """Rows start..stop (exclusive) of the sorted rows go to one expert; never empty."""

    expert: int
    start: int
    stop: int


class RankPart(NamedTuple):
    """num_rows of an expert's rows go to this rank."""

    rank: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class ExpertOrder:
    """An order of experts: the rank of each, and the expert of each rank.

    parts: experts with several ranks, and how many of their rows, in the order of the tokens, each of those gets.
    """

    rank_E: Indices
    experts: Sequence[int]
    parts: Mapping[int, Sequence[RankPart]] = field(default_factory=dict, kw_only=True)

    def ranks_of(self, ids_R: Indices) -> Indices:
        """Raises IndexError for an expert that the order does not have."""
        rank_R: Indices = self.rank_E[ids_R]
        for expert, parts in self.parts.items():
            [rows] = np.nonzero(ids_R == expert)
            ends = np.cumsum([part.num_rows for part in parts])[:-1]
            for part, rows_of_part in zip(parts, np.split(rows, ends), strict=True):
                rank_R[rows_of_part] = part.rank
        return rank_R


@dataclass(frozen=True, slots=True)
class RowPlan:
    """A copy is a place in [T, K], counted through.

    copy_of_row_R: the copy that becomes the row. row_of_copy_TK: for token t and its k-th expert in ascending order
    the row that answers it. spans: in the order of their rows; ranks: of their experts.
    """

    copy_of_row_R: Indices
    row_of_copy_TK: Indices
    spans: list[ExpertSpan]
    ranks: list[int]

    def tokens_of(self, spans: Iterable[ExpertSpan]) -> npt.NDArray[np.bool_]:
        """bool [T]: the tokens that have a row in any of the spans."""
        in_spans_R = np.zeros(len(self.copy_of_row_R), dtype=np.bool_)
        for span in spans:
            in_spans_R[span.start : span.stop] = True
        has_row_T: npt.NDArray[np.bool_] = np.logical_or.reduce(in_spans_R[self.row_of_copy_TK], axis=1)
        return has_row_T


def plan_rows(topk_ids_TK: torch.Tensor, order: ExpertOrder | None = None) -> RowPlan:
    """Groups the rows by expert. The order of a token's experts in the K axis does not matter.

    order: of the experts; None: ascending. On a GPU this is the one host sync of a dispatch. Raises IndexError for an
    expert that the order does not have.
    """
    ids_TK = topk_ids_TK.cpu().numpy()
    rank_R = ids_TK.reshape(-1) if order is None else order.ranks_of(ids_TK.reshape(-1))
    copy_of_row_R = rank_R.argsort(kind="stable")
    row_of_copy_TK = copy_of_row_R.argsort(kind="stable").reshape(ids_TK.shape)
    if ids_TK.shape[1] > 1:
        in_expert_order_TK = ids_TK.argsort(axis=1, kind="stable")
        row_of_copy_TK = np.take_along_axis(row_of_copy_TK, in_expert_order_TK, axis=1)
    spans: list[ExpertSpan] = []
    ranks: list[int] = []
    start = 0
    for rank, num_rows in enumerate(np.bincount(rank_R).tolist()):
        if num_rows:
            expert = rank if order is None else order.experts[rank]
            spans.append(ExpertSpan(expert, start, start + num_rows))
            ranks.append(rank)
            start += num_rows
    return RowPlan(copy_of_row_R, row_of_copy_TK, spans, ranks)
