"""The rows of a dispatch as they leave: every copy of a token scaled, grouped as an order of experts says, on the host.

Shapes: T tokens, D model, K top-k, R = T * K routed rows, B bytes of a row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from experts.native.lane_kernels import LaneKernels
from experts.routed_rows import check_shapes, combine_rows, scale_copies
from experts.row_plan import ExpertOrder, ExpertSpan, RowPlan, plan_rows

Bytes = npt.NDArray[np.uint8]


class RowSorter:
    """With compiled kernels where there are some and they know the types, else plainly: the bits are the same."""

    def __init__(self, kernels: LaneKernels | None) -> None:
        self._kernels = kernels

    def sort(
        self, x_TD: torch.Tensor, topk_ids_TK: torch.Tensor, topk_scores_TK: torch.Tensor, order: ExpertOrder
    ) -> tuple[RowPlan, Bytes]:
        """The plan and rows_RB. Raises ValueError as ``scale_copies`` does, IndexError as ``plan_rows`` does."""
        kernels = self._kernels
        if kernels is None or order.parts or not kernels.sorts(x_TD, topk_ids_TK, topk_scores_TK):
            scaled_CD = scale_copies(x_TD, topk_ids_TK, topk_scores_TK)
            plan = plan_rows(topk_ids_TK, order)
            return plan, _host_rows(scaled_CD, plan)
        num_tokens, top_k = check_shapes(x_TD, topk_ids_TK, topk_scores_TK)
        rows_RB = np.empty((num_tokens * top_k, x_TD.shape[1] * x_TD.dtype.itemsize), dtype=np.uint8)
        copy_of_row_R, row_of_copy_TK, spans = kernels.sort_rows(
            x_TD, topk_ids_TK, topk_scores_TK, order.rank_E, len(order.experts), rows_RB
        )
        ranks, experts = spans[::3], order.experts
        found = [
            ExpertSpan(experts[rank], start, stop)
            for rank, start, stop in zip(ranks, spans[1::3], spans[2::3], strict=True)
        ]
        return RowPlan(copy_of_row_R, row_of_copy_TK, found, ranks), rows_RB

    def put_back(self, results_RB: Bytes, plan: RowPlan, like_TD: torch.Tensor) -> torch.Tensor:
        """y_TD: each token's answers, summed in expert order, of like_TD's dtype, on the host."""
        if self._kernels is not None and like_TD.dtype in (torch.float32, torch.bfloat16):
            return self._kernels.combine_rows(results_RB, plan.row_of_copy_TK, like_TD)
        y_RD = torch.from_numpy(results_RB).view(like_TD.dtype)
        return combine_rows(y_RD, torch.from_numpy(plan.row_of_copy_TK))


def _host_rows(scaled_CD: torch.Tensor, plan: RowPlan) -> Bytes:
    """The rows in the order of the plan, as bytes: transports send from host memory."""
    scaled_CB: Bytes = scaled_CD.detach().cpu().view(torch.uint8).numpy()
    return scaled_CB.take(plan.copy_of_row_R, axis=0)
