"""The permutation between tokens and routed rows.

Every (token, expert) pair is one routed row: the token's hidden state times that pair's score. The rows of one expert
are contiguous, within an expert by token; experts come in ascending order, or in one that the caller names, such as
shard by shard:

    tokens   t0 -> e2, e0     t1 -> e2          rows   e0: t0 | e2: t0 t1
                                                spans  (0, 0, 1)  (2, 1, 3)

The index work is numpy's: on so few numbers a torch operation costs ten times as much.

Shapes: T tokens, D model, K top-k, R = T * K routed rows, S spans, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
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
class RoutedRows:
    """What dispatch sends and what combine needs to put the answers back.

    experts_S, order_S, stops_S: of each span its expert, that one's place in the order, and the end of its rows.
    row_of_copy_TK: for token t and its k-th expert in ascending order the row that answers it.
    """

    x_RD: torch.Tensor
    experts_S: Indices
    order_S: Indices
    stops_S: Indices
    row_of_copy_TK: torch.Tensor

    @property
    def spans(self) -> tuple[ExpertSpan, ...]:
        stops = self.stops_S.tolist()
        return tuple(map(ExpertSpan, self.experts_S.tolist(), [0, *stops], stops))


def route_rows(
    x_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_scores_TK: torch.Tensor,
    order: Callable[[Indices], Indices] | None = None,
) -> RoutedRows:
    """Groups the rows by expert and scales them: Llama 4 scales the expert's input.

    topk_ids_TK: integer, topk_scores_TK: any float dtype, cast to x's before the product. The order of a token's
    experts in the K axis does not matter. order: asked with the experts of all rows, gives order_E, by which they are
    sorted; None: by the experts themselves. Raises ValueError when the shapes do not belong together.
    """
    shape = topk_ids_TK.shape
    if shape != topk_scores_TK.shape or shape[:1] != x_TD.shape[:1]:
        raise ValueError(
            f"topk_ids {list(shape)} and topk_scores {list(topk_scores_TK.shape)} must both be [{x_TD.shape[0]}, K]"
        )
    # On a GPU this is the one host sync of a dispatch.
    ids_R = topk_ids_TK.cpu().numpy().reshape(-1)
    order_R = ids_R if order is None else order(ids_R)[ids_R]
    copy_of_row_R = order_R.argsort(kind="stable")
    row_of_copy_R = np.empty_like(copy_of_row_R)
    row_of_copy_R[copy_of_row_R] = np.arange(len(copy_of_row_R))
    order_R = order_R[copy_of_row_R]
    last_S = _last_of_each_run(order_R)
    scaled_RD = _scaled(x_TD, topk_scores_TK.to(x_TD.dtype))
    return RoutedRows(
        x_RD=scaled_RD.index_select(0, _on(x_TD, copy_of_row_R)),
        experts_S=ids_R[copy_of_row_R[last_S]],
        order_S=order_R[last_S],
        stops_S=last_S + 1,
        row_of_copy_TK=_on(x_TD, _in_expert_order(row_of_copy_R.reshape(shape), ids_R.reshape(shape))),
    )


def _scaled(x_TD: torch.Tensor, scores_TK: torch.Tensor) -> torch.Tensor:
    """Token by token, each token's copies in the order of the K axis: [T * K, D]."""
    if scores_TK.shape[1] == 1:
        return x_TD * scores_TK
    return (x_TD.unsqueeze(1) * scores_TK.unsqueeze(2)).flatten(0, 1)


def _last_of_each_run(sorted_R: Indices) -> Indices:
    is_last_R = np.ones(len(sorted_R), dtype=np.bool_)
    np.not_equal(sorted_R[1:], sorted_R[:-1], out=is_last_R[:-1])
    return is_last_R.nonzero()[0]


def _in_expert_order(row_of_copy_TK: Indices, ids_TK: Indices) -> Indices:
    if ids_TK.shape[1] == 1:
        return row_of_copy_TK
    return np.take_along_axis(row_of_copy_TK, ids_TK.argsort(axis=1, kind="stable"), axis=1)


def _on(x_TD: torch.Tensor, indices: Indices) -> torch.Tensor:
    on_host = torch.from_numpy(indices)
    return on_host if x_TD.is_cpu else on_host.to(x_TD.device)


def combine_rows(y_RD: torch.Tensor, row_of_copy_TK: torch.Tensor) -> torch.Tensor:
    """y_TD: each token's answers, summed in expert order.

    One expert per token: its bits, untouched. More: added in float32 one after the other, cast to y's dtype once
    at the end, which is how torch sums a bfloat16 axis; the bits depend neither on the order of the K axis nor on
    which shard answered.
    """
    if row_of_copy_TK.shape[1] == 1:
        return y_RD.index_select(0, row_of_copy_TK.view(-1))
    total_TD = torch.zeros(row_of_copy_TK.shape[0], y_RD.shape[1], dtype=torch.float32, device=y_RD.device)
    for rows_T in row_of_copy_TK.unbind(1):
        total_TD += y_RD.index_select(0, rows_T)
    return total_TD.to(y_RD.dtype)


def tokens_of_rows(spans: list[ExpertSpan], row_of_copy_TK: torch.Tensor) -> torch.Tensor:
    """bool [T]: the tokens that have a row in any of the spans."""
    in_spans_R = torch.zeros(row_of_copy_TK.numel(), dtype=torch.bool, device=row_of_copy_TK.device)
    for span in spans:
        in_spans_R[span.start : span.stop] = True
    return in_spans_R[row_of_copy_TK].any(dim=1)
