"""A mixture-of-experts layer as the router sees it: the experts themselves are behind the dispatcher.

Shapes: T tokens, D model, K top-k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from experts.dispatch import Combined, Dispatcher, Handle
from experts.mlp import Mlp
from router.gating import Gate


class RowsAway(NamedTuple):
    """A layer's tokens while their rows are with the experts. shared_TD: residual and shared expert."""

    handle: Handle
    shared_TD: torch.Tensor


class MoeLayer:
    """``layer`` is the decoder layer's number, by which the dispatcher finds the experts."""

    def __init__(self, layer: int, gate: Gate, shared_expert: Mlp) -> None:
        self._layer = layer
        self._gate = gate
        self._shared_expert = shared_expert

    def send(self, x_TD: torch.Tensor, dispatcher: Dispatcher, *, residual_TD: torch.Tensor) -> RowsAway:
        """Sends the rows to their experts. The dispatcher scales what it sends by the scores; the shared expert takes
        the unscaled input, and runs while the rows travel."""
        gating = self._gate(x_TD)
        handle = dispatcher.dispatch(self._layer, x_TD, gating.topk_ids_TK, gating.topk_scores_TK)
        return RowsAway(handle, self._shared_expert(x_TD, added_RD=residual_TD))


def receive(away: RowsAway, dispatcher: Dispatcher) -> Combined:
    """Residual, shared and routed experts in one sum, [T, D]; where ``missing_T`` is True not all are there."""
    routed = dispatcher.combine(away.handle)
    return Combined(away.shared_TD + routed.y_TD, routed.missing_T)
