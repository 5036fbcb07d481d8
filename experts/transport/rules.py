"""What a shard asks of its lanes, whatever they travel by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from experts.message import Header, Refusal, RowsPerExpert
from experts.opening import LaneTerms, check_answer, make_welcome


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneRules:
    """``admit`` says why a well-formed request is refused, None if it is not."""

    secret: bytes
    shard_id: str
    hidden_size: int
    dtype: torch.dtype
    max_rows: int
    dead_after_s: float
    admit: Callable[[Header, RowsPerExpert], Refusal | None]

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * self.dtype.itemsize

    def welcome(self, answer: bytes, *, challenge: bytes, lane: int) -> tuple[str, bytes]:
        """The router's lane id, and the welcome that it gets. Raises OpeningError if it gets none."""
        lane_id = check_answer(answer, challenge=challenge, secret=self.secret, shard_id=self.shard_id)
        terms = LaneTerms(
            lane=lane,
            hidden_size=self.hidden_size,
            dtype=str(self.dtype).removeprefix("torch."),
            max_rows=self.max_rows,
        )
        return lane_id, make_welcome(terms, challenge=challenge, answer=answer, secret=self.secret)
