"""The service as its controller shows it, and whether all of it is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.control.membership import MemberKind, MemberState
from cluster.v1 import admin_pb2

Slot = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberView:
    """slots: (layer, expert), of shards only."""

    member_id: str
    kind: MemberKind
    pid: int
    state: MemberState
    slots: tuple[Slot, ...] = ()


@dataclass(frozen=True, slots=True)
class View:
    members: tuple[MemberView, ...]

    def ready(self, kind: MemberKind) -> list[MemberView]:
        """In order of their ids, so that a draw by number says who is meant."""
        ready = [each for each in self.members if each.kind is kind and each.state is MemberState.READY]
        return sorted(ready, key=lambda each: each.member_id)

    def state_of(self, member_id: str) -> MemberState | None:
        return next((each.state for each in self.members if each.member_id == member_id), None)

    @property
    def shape(self) -> tuple[Counter[tuple[MemberKind, MemberState]], Counter[Slot]]:
        """Members that are not dead, by kind and state, and how many of them hold each slot. Equal before a fault and
        after it when nothing is missing, too much, or still on its way."""
        alive = [each for each in self.members if each.state is not MemberState.DEAD]
        states = Counter((each.kind, each.state) for each in alive)
        return states, Counter(slot for each in alive for slot in each.slots)

    def pids(self) -> dict[str, int]:
        """Of the living, by member."""
        return {each.member_id: each.pid for each in self.members if each.state is not MemberState.DEAD}


def view_of(response: admin_pb2.GetViewResponse) -> View:
    kinds = {MemberKind.GATEWAY: response.gateways, MemberKind.ROUTER: response.routers}
    members = [_member(response.controller, MemberKind.CONTROLLER)]
    members += [_member(each, kind) for kind, some in kinds.items() for each in some]
    for shard in response.shards:
        slots = [(slot.layer, slot.expert) for slot in shard.slots]
        members.append(_member(shard.member, MemberKind.SHARD, slots))
    return View(tuple(members))


def _member(member: admin_pb2.Member, kind: MemberKind, slots: Sequence[Slot] = ()) -> MemberView:
    state = MemberState(member.state)
    return MemberView(member_id=member.id, kind=kind, pid=member.pid, state=state, slots=tuple(slots))
