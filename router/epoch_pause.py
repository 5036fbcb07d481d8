"""How long going over to an epoch holds a router's streams up."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

_NUM_STEPS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochPause:
    """first_step_s: from the commit's arrival to the end of the first step in the epoch. median_step_s: of the steps
    before, of which there must have been some."""

    epoch: int
    first_step_s: float
    median_step_s: float

    @property
    def pause_s(self) -> float:
        """Never negative: the first step may well be a short one."""
        return max(0.0, self.first_step_s - self.median_step_s)

    @property
    def sentence(self) -> str:
        return (
            f"epoch {self.epoch}: pause {1e3 * self.pause_s:.1f} ms; the first step ended "
            f"{1e3 * self.first_step_s:.1f} ms after the commit, median step {1e3 * self.median_step_s:.1f} ms"
        )


class EpochPauseMeter:
    """Hears of steps and epochs, in seconds of one monotonic clock. An epoch that comes while nothing is computed holds
    nobody up and has no pause; nor has one before the first step."""

    def __init__(self) -> None:
        self._step_s: deque[float] = deque(maxlen=_NUM_STEPS)
        self._adopting: tuple[int, float] | None = None

    def epoch_adopted(self, number: int, began_s: float) -> None:
        self._adopting = (number, began_s) if self._step_s else None

    def rests(self) -> None:
        """There is no work: steps that come later are others."""
        self._adopting = None
        self._step_s.clear()

    def step_ended(self, began_s: float, ended_s: float) -> EpochPause | None:
        """The pause, after the first step in an epoch."""
        adopting, self._adopting = self._adopting, None
        pause = None
        if adopting is not None:
            number, adopting_s = adopting
            pause = EpochPause(epoch=number, first_step_s=ended_s - adopting_s, median_step_s=median(self._step_s))
        self._step_s.append(ended_s - began_s)
        return pause
