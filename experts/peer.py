"""A shard as a lane sees it: its link, what is under way there, and for how long it is believed to live."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from experts.lane_request import LaneRequest
from experts.placement import ShardId
from experts.transport.base import Link

# Within the shortest time after which a shard is given up.
LOOKS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """timeout_s bounds each wait for rows. A shard that owes rows and shows no sign of work for silence_s is given up
    before. Raises ValueError for a time that is not positive."""

    timeout_s: float
    silence_s: float

    def __post_init__(self) -> None:
        for name in ("timeout_s", "silence_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def look_s(self) -> float:
        """Between two looks at those that owe rows."""
        return min(self.timeout_s, self.silence_s) / LOOKS


@dataclass(slots=True, kw_only=True, eq=False)
class Peer:
    """Lives, as far as is known. requests: under way to it, the oldest first. progress: the link's, at the last look;
    still_s: for how long it has been that. is_writing: whether room in its socket is waited for."""

    shard_id: ShardId
    link: Link
    dtype: torch.dtype
    requests: list[LaneRequest] = field(default_factory=list)
    progress: int = -1
    still_s: float = 0.0
    is_writing: bool = False

    @property
    def phase(self) -> str:
        return "send" if self.link.sending else "wait"

    def add(self, request: LaneRequest) -> None:
        if not self.requests:
            self.still_s = 0.0
        self.requests.append(request)

    def complaint(self, patience: Patience, *, now: float, passed_s: float, waiting_since: float) -> str | None:
        """A look at one that owes rows: why it is to be given up, or None. passed_s: since the last look, as far as it
        counts. One that is at work at its deadline gets as long again, no more."""
        progress = self.link.progress
        self.still_s = self.still_s + passed_s if progress == self.progress else 0.0
        self.progress = progress
        if self.still_s >= patience.silence_s:
            return f"no sign of work for {patience.silence_s:g} s"
        deadline = self.requests[0].deadline
        if not self.still_s:
            deadline = max(deadline, waiting_since) + patience.timeout_s
        return f"no answer within {patience.timeout_s:g} s" if now > deadline else None
