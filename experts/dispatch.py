"""Dispatch and combine: how an MoE layer hands rows to experts and gets them back.

``LocalDispatcher`` is the plain version and the oracle of every other one.

Shapes: T tokens, D model, K top-k, R = T * K routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from experts.placement import ShardId
from experts.routed_rows import combine_rows, route_rows
from experts.shard import Shard


class Combined(NamedTuple):
    """The experts' output in the order of the tokens.

    y_TD has x's dtype and device. missing_T is bool [T], true for tokens one of whose experts could not be
    reached (that expert then adds nothing to y_TD); None when there are none.
    """

    y_TD: torch.Tensor
    missing_T: torch.Tensor | None


class Handle:
    """What links a combine to its dispatch. Good for one combine of the dispatcher that made it."""

    __slots__ = ()


class Dispatcher(Protocol):
    """One router rank's way to the experts. Not thread-safe: it belongs to the engine's thread.

    lost: why each shard that is masked was given up; the reason names shard, layer and phase.
    """

    lost: dict[ShardId, str]

    def begin_step(self, step: int) -> None:
        """Names the step in what follows; handles of earlier steps are abandoned. Steps must grow."""

    def dispatch(
        self, layer: int, x_TD: torch.Tensor, topk_ids_TK: torch.Tensor, topk_scores_TK: torch.Tensor
    ) -> Handle:
        """Scales each routed copy by its score (already through the sigmoid) and sends it; T may be 0.

        Returns when every row has left. Several dispatches of a step, also of one layer, may be open at once.
        Raises ValueError for shapes that do not fit or an expert that is placed nowhere.
        """

    def combine(self, handle: Handle) -> Combined:
        """Waits for the rows and puts them back in place. A lost expert is told in the result, not raised.

        Raises ValueError for a handle of an earlier step.
        """

    def close(self) -> None:
        """Idempotent."""


@dataclass(slots=True, kw_only=True, eq=False)
class _LocalHandle(Handle):
    y_RD: torch.Tensor
    row_of_copy_TK: torch.Tensor


class LocalDispatcher:
    """Experts in this process: a function call. Every slot of the model must be in the shard."""

    def __init__(self, shard: Shard) -> None:
        self.lost: dict[ShardId, str] = {}
        self._shard = shard

    def begin_step(self, step: int) -> None:
        """Nothing to name: no message leaves the process."""

    def dispatch(
        self, layer: int, x_TD: torch.Tensor, topk_ids_TK: torch.Tensor, topk_scores_TK: torch.Tensor
    ) -> Handle:
        routed = route_rows(x_TD, topk_ids_TK, topk_scores_TK)
        rows_per_expert = [(expert, stop - start) for expert, start, stop in routed.spans]
        y_RD = self._shard.apply(layer, routed.x_RD, rows_per_expert)
        return _LocalHandle(y_RD=y_RD, row_of_copy_TK=routed.row_of_copy_TK)

    def combine(self, handle: Handle) -> Combined:
        assert isinstance(handle, _LocalHandle)
        return Combined(combine_rows(handle.y_RD, handle.row_of_copy_TK), None)

    def close(self) -> None:
        """Holds nothing that needs closing."""
