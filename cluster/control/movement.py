"""A rebalance that is carried out: placements one after the other, each taken up as an epoch. Pure.

as it was --stage 1: prepare, commit--> --stage 2: prepare, commit--> done
                    |
                 given up: what was in force before this stage stays
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from experts.placement import ExpertPlacement


class MovementState(StrEnum):
    MOVING = "moving"
    DONE = "done"
    GIVEN_UP = "given_up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """placements: the one it begins with, then what each stage leads to. num_taken_up: stages whose epoch has come
    into force. It is given up when its progress stays what it is until due_s. failure: why it was given up."""

    movement_id: str
    placements: tuple[ExpertPlacement, ...]
    stall_s: float
    due_s: float
    num_taken_up: int = 0
    state: MovementState = MovementState.MOVING
    failure: str | None = None
    progress: Hashable = None

    @classmethod
    def begin(
        cls, movement_id: str, placements: Sequence[ExpertPlacement], *, stall_s: float, now_s: float
    ) -> Movement:
        return cls(movement_id=movement_id, placements=tuple(placements), stall_s=stall_s, due_s=now_s + stall_s)

    @property
    def is_open(self) -> bool:
        return self.state is MovementState.MOVING

    @property
    def num_stages(self) -> int:
        return len(self.placements) - 1

    @property
    def base(self) -> ExpertPlacement:
        """What is in force before the next stage."""
        return self.placements[self.num_taken_up]

    @property
    def next_placement(self) -> ExpertPlacement | None:
        """None after the last stage."""
        return self.placements[self.num_taken_up + 1] if self.num_taken_up < self.num_stages else None

    def watched(self, progress: Hashable, now_s: float) -> Movement:
        """Where progress is not what it was, the deadline moves."""
        return self if progress == self.progress else replace(self, progress=progress, due_s=now_s + self.stall_s)

    def taken_up(self) -> Movement:
        return replace(self, num_taken_up=self.num_taken_up + 1)

    def ended(self, failure: str | None) -> Movement:
        return replace(self, state=MovementState.GIVEN_UP if failure else MovementState.DONE, failure=failure)
