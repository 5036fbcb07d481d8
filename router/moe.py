"""A mixture-of-experts layer as the router sees it: the experts themselves are behind the dispatcher.

Shapes: T tokens, D model, K top-k.
"""

from __future__ import annotations

import torch

from experts.dispatch import Combined, Dispatcher
from experts.mlp import Mlp
from router.gating import Gate


class MoeLayer:
    """``layer`` is the decoder layer's number, by which the dispatcher finds the experts."""

    def __init__(self, layer: int, gate: Gate, shared_expert: Mlp) -> None:
        self._layer = layer
        self._gate = gate
        self._shared_expert = shared_expert

    def __call__(self, x_TD: torch.Tensor, dispatcher: Dispatcher, *, residual_TD: torch.Tensor) -> Combined:
        """Residual, shared and routed experts in one sum, [T, D]; where ``missing_T`` is True not all are there.

        The dispatcher scales what it sends by the scores. The shared expert takes the unscaled input, and runs
        while the rows travel.
        """
        gating = self._gate(x_TD)
        handle = dispatcher.dispatch(self._layer, x_TD, gating.topk_ids_TK, gating.topk_scores_TK)
        shared_TD = self._shared_expert(x_TD, added_RD=residual_TD)
        routed = dispatcher.combine(handle)
        return Combined(shared_TD + routed.y_TD, routed.missing_T)
