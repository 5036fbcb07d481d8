"""Rows on their way to experts and back: each copy of a token scaled, sorted as row_plan.py says, and put back.

Shapes: T tokens, D model, K top-k, R = T * K routed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from experts.row_plan import ExpertSpan, plan_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedRows:
    """row_of_copy_TK: for token t and its k-th expert in ascending order the row that answers it."""

    x_RD: torch.Tensor
    spans: Sequence[ExpertSpan]
    row_of_copy_TK: torch.Tensor


def route_rows(x_TD: torch.Tensor, topk_ids_TK: torch.Tensor, topk_scores_TK: torch.Tensor) -> RoutedRows:
    """The rows by ascending expert. topk_ids_TK: integer; otherwise as ``scale_copies``."""
    scaled_RD = scale_copies(x_TD, topk_ids_TK, topk_scores_TK)
    plan = plan_rows(topk_ids_TK)
    return RoutedRows(
        x_RD=scaled_RD.index_select(0, torch.from_numpy(plan.copy_of_row_R).to(x_TD.device)),
        spans=plan.spans,
        row_of_copy_TK=torch.from_numpy(plan.row_of_copy_TK).to(x_TD.device),
    )


def scale_copies(x_TD: torch.Tensor, topk_ids_TK: torch.Tensor, topk_scores_TK: torch.Tensor) -> torch.Tensor:
    """Every copy of a token times its score: Llama 4 scales the expert's input. [T * K, D], token by token.

    topk_scores_TK: any float dtype, cast to x's before the product. Raises ValueError when the shapes do not belong
    together.
    """
    _num_tokens, top_k = check_shapes(x_TD, topk_ids_TK, topk_scores_TK)
    scores_TK = topk_scores_TK if topk_scores_TK.dtype is x_TD.dtype else topk_scores_TK.to(x_TD.dtype)
    if top_k == 1:
        return x_TD * scores_TK
    return (x_TD.unsqueeze(1) * scores_TK.unsqueeze(2)).flatten(0, 1)


def check_shapes(x_TD: torch.Tensor, topk_ids_TK: torch.Tensor, topk_scores_TK: torch.Tensor) -> tuple[int, int]:
    """T and K. Raises ValueError when the shapes do not belong together."""
    num_tokens, top_k = shape = topk_scores_TK.shape
    if topk_ids_TK.shape != shape or x_TD.shape[0] != num_tokens:
        raise ValueError(
            f"topk_ids {list(topk_ids_TK.shape)} and topk_scores {list(shape)} must both be [{x_TD.shape[0]}, K]"
        )
    return num_tokens, top_k


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
