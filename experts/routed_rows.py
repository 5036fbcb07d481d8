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
    experts_TK, k_order_TK = topk_ids_TK.sort(dim=1, stable=True)
    scores_R = topk_scores_TK.gather(1, k_order_TK).reshape(-1).to(x_TD.dtype)
    experts_R, copy_of_row_R = experts_TK.reshape(-1).sort(stable=True)
    token_of_row_R = copy_of_row_R // max(topk_ids_TK.shape[1], 1)
    row_of_copy_R = torch.empty_like(copy_of_row_R)
    row_of_copy_R[copy_of_row_R] = torch.arange(copy_of_row_R.shape[0], device=copy_of_row_R.device)
    return RoutedRows(
        x_RD=x_TD.index_select(0, token_of_row_R) * scores_R.index_select(0, copy_of_row_R).unsqueeze(1),
        spans=_spans(experts_R),
        row_of_copy_TK=row_of_copy_R.view(topk_ids_TK.shape),
    )


def _spans(experts_R: torch.Tensor) -> tuple[ExpertSpan, ...]:
    experts, counts = torch.unique_consecutive(experts_R, return_counts=True)
    spans: list[ExpertSpan] = []
    start = 0
    # One transfer for both: on a GPU each .tolist() is a host sync.
    for expert, count in torch.stack([experts, counts]).T.tolist():
        spans.append(ExpertSpan(expert, start, start + count))
        start += count
    return tuple(spans)


def combine_rows(y_RD: torch.Tensor, row_of_copy_TK: torch.Tensor) -> torch.Tensor:
    """y_TD: each token's answers, summed in expert order.

    One expert per token: its bits, untouched. More: added in float32 one after the other, cast to y's dtype once
    at the end, which is how torch sums a bfloat16 axis; the bits depend neither on the order of the K axis nor on
    which shard answered.
    """
    rows_TK = row_of_copy_TK.unbind(1)
    if len(rows_TK) == 1:
        return y_RD.index_select(0, rows_TK[0])
    total_TD = torch.zeros(row_of_copy_TK.shape[0], y_RD.shape[1], dtype=torch.float32, device=y_RD.device)
    for rows_T in rows_TK:
        total_TD += y_RD.index_select(0, rows_T)
    return total_TD.to(y_RD.dtype)


def tokens_of_rows(spans: list[ExpertSpan], row_of_copy_TK: torch.Tensor) -> torch.Tensor:
    """bool [T]: the tokens that have a row in any of the spans."""
    in_spans_R = torch.zeros(row_of_copy_TK.numel(), dtype=torch.bool, device=row_of_copy_TK.device)
    for span in spans:
        in_spans_R[span.start : span.stop] = True
    return in_spans_R[row_of_copy_TK].any(dim=1)
