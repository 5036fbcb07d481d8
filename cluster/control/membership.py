"""Who belongs to the service and in what state each is. Pure: time comes in as an argument, in seconds.

report --> STARTING --> READY <--> SUSPECT (silent, routed around, not killed)
               \\          |          |
                +--------> DEAD <-----+   (its process has ended; never comes back under this id)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NewType

MemberId = NewType("MemberId", str)


class MemberKind(StrEnum):
    CONTROLLER = "controller"
    GATEWAY = "gateway"
    ROUTER = "router"
    SHARD = "shard"


class MemberState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process of the service. member_id is unique for good: a restarted process has another.

    pid is of the process that does the work (a router's is its engine process), 0 while there is none yet;
    node_id is Ray's.
    """

    member_id: MemberId
    kind: MemberKind
    pid: int
    node_id: str
    state: MemberState

    def to_dict(self) -> dict[str, str | int]:
        """As `arriero status --json` prints it."""
        return {"id": self.member_id, "pid": self.pid, "node": self.node_id, "state": self.state.value}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sighting:
    member: Member
    seen_s: float


class Membership:
    """The members seen so far. A member silent for suspect_after_s is suspect; a dead one is shown for a while."""

    def __init__(self, *, suspect_after_s: float, forget_dead_after_s: float) -> None:
        self._suspect_after_s = suspect_after_s
        self._forget_dead_after_s = forget_dead_after_s
        self._sightings: dict[MemberId, _Sighting] = {}

    def report(self, member: Member, now_s: float) -> bool:
        """Takes what a member says of itself. False when it is known to be dead: then nothing changes."""
        known = self._sightings.get(member.member_id)
        if known is not None and known.member.state is MemberState.DEAD:
            return False
        self._sightings[member.member_id] = _Sighting(member=member, seen_s=now_s)
        return True

    def mark_dead(self, member_id: MemberId, now_s: float) -> bool:
        """The member's process has ended. False when that is no news; unknown members stay unknown."""
        known = self._sightings.get(member_id)
        if known is None or known.member.state is MemberState.DEAD:
            return False
        self._sightings[member_id] = _Sighting(member=_in_state(known.member, MemberState.DEAD), seen_s=now_s)
        return True

    def leave(self, member_id: MemberId) -> None:
        """The member has ended as it should."""
        self._sightings.pop(member_id, None)

    def forget_old_dead(self, now_s: float) -> tuple[MemberId, ...]:
        """Drops members that have been dead for long enough, and returns them."""
        old = tuple(
            member_id
            for member_id, sighting in self._sightings.items()
            if sighting.member.state is MemberState.DEAD and now_s - sighting.seen_s > self._forget_dead_after_s
        )
        for member_id in old:
            del self._sightings[member_id]
        return old

    def __contains__(self, member_id: MemberId) -> bool:
        return member_id in self._sightings

    def of_kind(self, kind: MemberKind, now_s: float) -> tuple[Member, ...]:
        """In the order in which they came."""
        return tuple(
            self._judge(sighting, now_s) for sighting in self._sightings.values() if sighting.member.kind is kind
        )

    def num_ready(self, kind: MemberKind, now_s: float) -> int:
        return sum(member.state is MemberState.READY for member in self.of_kind(kind, now_s))

    def _judge(self, sighting: _Sighting, now_s: float) -> Member:
        silent = now_s - sighting.seen_s > self._suspect_after_s
        if silent and sighting.member.state is MemberState.READY:
            return _in_state(sighting.member, MemberState.SUSPECT)
        return sighting.member


def _in_state(member: Member, state: MemberState) -> Member:
    return replace(member, state=state)
