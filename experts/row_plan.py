"""Which row goes where: the permutation between tokens and routed rows, as numbers.

Every (token, expert) pair, a copy of the token, becomes one routed row. The rows of one expert are contiguous, within
an expert by token; experts come in ascending order, or in one that the caller names, such as shard by shard:

    tokens   t0 -> e2, e0     t1 -> e2          rows   e0: t0 | e2: t0 t1
                                                spans  (0, 0, 1)  (2, 1, 3)

It is all numpy: on so few numbers a torch operation costs ten times as much.

Shapes: T tokens, K top-k, R = T * K routed rows, S spans, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """Which row goes where. A copy is a place in [T, K], counted through.

    copy_of_row_R: the copy that becomes the row. row_of_copy_TK: for token t and its k-th expert in ascending order
    the row that answers it. experts_S, order_S, stops_S: of each span its expert, that one's place in the order, and
    the end of its rows.
    """

    copy_of_row_R: Indices
    row_of_copy_TK: Indices
    experts_S: Indices
    order_S: Indices
    stops_S: Indices

    @property
    def spans(self) -> tuple[ExpertSpan, ...]:
        stops = self.stops_S.tolist()
        return tuple(map(ExpertSpan, self.experts_S.tolist(), [0, *stops], stops))

    def tokens_of(self, spans: Iterable[ExpertSpan]) -> npt.NDArray[np.bool_]:
        """bool [T]: the tokens that have a row in any of the spans."""
        in_spans_R = np.zeros(len(self.copy_of_row_R), dtype=np.bool_)
        for span in spans:
            in_spans_R[span.start : span.stop] = True
        has_row_T: npt.NDArray[np.bool_] = np.logical_or.reduce(in_spans_R[self.row_of_copy_TK], axis=1)
        return has_row_T


def plan_rows(topk_ids_TK: torch.Tensor, order: Callable[[Indices], Indices] | None = None) -> RowPlan:
    """Groups the rows by expert. The order of a token's experts in the K axis does not matter.

    order: asked with the experts of all rows, gives order_E, by which they are sorted; None: by the experts themselves.
    On a GPU this is the one host sync of a dispatch.
    """
    ids_TK = topk_ids_TK.cpu().numpy()
    ids_R = ids_TK.reshape(-1)
    order_R = ids_R if order is None else order(ids_R)[ids_R]
    copy_of_row_R = order_R.argsort(kind="stable")
    row_of_copy_R = np.empty_like(copy_of_row_R)
    row_of_copy_R[copy_of_row_R] = np.arange(len(copy_of_row_R))
    order_R = order_R[copy_of_row_R]
    last_S = _last_of_each_run(order_R)
    return RowPlan(
        copy_of_row_R=copy_of_row_R,
        row_of_copy_TK=_in_expert_order(row_of_copy_R.reshape(ids_TK.shape), ids_TK),
        experts_S=ids_R[copy_of_row_R[last_S]],
        order_S=order_R[last_S],
        stops_S=last_S + 1,
    )


def _last_of_each_run(sorted_R: Indices) -> Indices:
    is_last_R = np.ones(len(sorted_R), dtype=np.bool_)
    np.not_equal(sorted_R[1:], sorted_R[:-1], out=is_last_R[:-1])
    return is_last_R.nonzero()[0]


def _in_expert_order(row_of_copy_TK: Indices, ids_TK: Indices) -> Indices:
    if ids_TK.shape[1] == 1:
        return row_of_copy_TK
    return np.take_along_axis(row_of_copy_TK, ids_TK.argsort(axis=1, kind="stable"), axis=1)
