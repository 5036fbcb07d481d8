"""The permutation between tokens and routed rows.

Every (token, expert) pair is one routed row: the token's hidden state times that pair's score. Rows are sorted by
expert, within an expert by token, so the rows of one expert are contiguous:

    tokens   t0 -> e2, e0     t1 -> e2          rows   e0: t0 | e2: t0 t1
                                                spans  (0, 0, 1)  (2, 1, 3)

Shapes: T tokens, D model, K top-k, R = T * K routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch


class ExpertSpan(NamedTuple):
    """Rows start..stop (exclusive) of the sorted rows go to one expert; never empty."""

    expert: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedRows:
    """What dispatch sends and what combine needs to put the answers back."""

    x_RD: torch.Tensor
    spans: tuple[ExpertSpan, ...]
    # For token t and its k-th expert in expert order: the row that answers it.
    row_of_copy_TK: torch.Tensor


def route_rows(x_TD: torch.Tensor, topk_ids_TK: torch.Tensor, topk_scores_TK: torch.Tensor) -> RoutedRows:
    """Groups the rows by expert and scales them: Llama 4 scales the expert's input.

    topk_ids_TK: integer, topk_scores_TK: any float dtype, cast to x's before the product. The order of a token's
    experts in the K axis does not matter. Raises ValueError when the shapes do not belong together.
    """
    num_tokens = x_TD.shape[0]
    if topk_ids_TK.shape != topk_scores_TK.shape or topk_ids_TK.shape[:1] != x_TD.shape[:1]:
        raise ValueError(
            f"topk_ids {list(topk_ids_TK.shape)} and topk_scores {list(topk_scores_TK.shape)} must both be "
            f"[{num_tokens}, K]"
        )
    # The index work is numpy's: on so few numbers a torch operation costs ten times as much. On a GPU this is the
    # one host sync of a dispatch.
    ids_R = topk_ids_TK.cpu().numpy().reshape(-1)
    copy_of_row_R = ids_R.argsort(kind="stable")
    row_of_copy_TK = np.empty_like(copy_of_row_R)
    row_of_copy_TK[copy_of_row_R] = np.arange(len(ids_R))
    row_of_copy_TK.shape = topk_ids_TK.shape
    if topk_ids_TK.shape[1] > 1:
        # Rows ascend with their experts: sorted, a token's rows are in expert order.
        row_of_copy_TK.sort(axis=1)
    scaled_RD = _scaled(x_TD, topk_scores_TK.to(x_TD.dtype))
    return RoutedRows(
        x_RD=scaled_RD.index_select(0, torch.from_numpy(copy_of_row_R).to(x_TD.device)),
        spans=_spans(ids_R[copy_of_row_R]),
        row_of_copy_TK=torch.from_numpy(row_of_copy_TK).to(x_TD.device),
    )


def _scaled(x_TD: torch.Tensor, scores_TK: torch.Tensor) -> torch.Tensor:
    """Token by token, and each token's copies in the order of its experts: [T * K, D]."""
    if scores_TK.shape[1] == 1:
        return x_TD * scores_TK
    return (x_TD.unsqueeze(1) * scores_TK.unsqueeze(2)).flatten(0, 1)


def _spans(experts_R: npt.NDArray[np.int64]) -> tuple[ExpertSpan, ...]:
    if not len(experts_R):
        return ()
    # The last row of every run but the last.
    ends = (experts_R[1:] != experts_R[:-1]).nonzero()[0]
    experts = [*experts_R[ends].tolist(), int(experts_R[-1])]
    stops = [*(ends + 1).tolist(), len(experts_R)]
    return tuple(map(ExpertSpan, experts, [0, *stops], stops))


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
