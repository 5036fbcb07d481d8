"""What an update of the weights does next, decided from what is known. Pure; updating.py acts and asks again.

loading --> starting_routers --> draining --> retiring --> done
   |               |        (new requests get
   +-- withdrawing +         the new version)
           |
        given_up: nothing has changed
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.control.membership import MemberId


class UpdateState(StrEnum):
    """LOADING: shards. STARTING_ROUTERS: each replica starts a second one, of the new version. DRAINING: requests of
    the old version end. RETIRING, WITHDRAWING: routers of the old version, or of the new one, end."""

    LOADING = "loading"
    STARTING_ROUTERS = "starting_routers"
    DRAINING = "draining"
    RETIRING = "retiring"
    DONE = "done"
    WITHDRAWING = "withdrawing"
    GIVEN_UP = "given_up"

    @property
    def is_over(self) -> bool:
        return self in (UpdateState.DONE, UpdateState.GIVEN_UP)


BOTH_WANTED = frozenset({UpdateState.STARTING_ROUTERS, UpdateState.DRAINING})


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateView:
    """is_loaded: shards serve the new version. old_routers, new_routers: the ready ones of each version, with the
    replica that each lives in. gateways_behind: those that may still have requests of the old version. all_known: this
    controller has been there for long enough to have heard of everybody. failure: why it cannot go on."""

    state: UpdateState
    is_loaded: bool = False
    old_routers: Mapping[MemberId, str] = field(default_factory=dict)
    new_routers: Mapping[MemberId, str] = field(default_factory=dict)
    gateways_behind: tuple[MemberId, ...] = ()
    all_known: bool = True
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """reason: why it is given up."""

    state: UpdateState
    reason: str | None = None


def next_step(view: UpdateView) -> Step | None:
    """None while there is something to wait for."""
    match view.state:
        case UpdateState.LOADING | UpdateState.STARTING_ROUTERS if view.failure is not None:
            return Step(state=UpdateState.WITHDRAWING, reason=view.failure)
        case UpdateState.LOADING if view.is_loaded:
            return Step(state=UpdateState.STARTING_ROUTERS)
        case UpdateState.STARTING_ROUTERS if view.all_known and view.old_routers and not _replicas_behind(view):
            return Step(state=UpdateState.DRAINING)
        case UpdateState.DRAINING if view.all_known and not view.gateways_behind:
            return Step(state=UpdateState.RETIRING)
        case UpdateState.RETIRING if view.all_known and not view.old_routers:
            return Step(state=UpdateState.DONE)
        case UpdateState.WITHDRAWING if view.all_known and not view.new_routers:
            return Step(state=UpdateState.GIVEN_UP)
    return None


def waits_for(view: UpdateView) -> tuple[str, ...]:
    """Members that the present state does not end without."""
    match view.state:
        case UpdateState.STARTING_ROUTERS:
            return tuple(_replicas_behind(view))
        case UpdateState.DRAINING:
            return view.gateways_behind
        case UpdateState.RETIRING:
            return tuple(view.old_routers)
        case UpdateState.WITHDRAWING:
            return tuple(view.new_routers)
    return ()


def wanted_versions(state: UpdateState | None, *, served: int, other: int | None) -> tuple[int, ...]:
    """The versions of which each replica should have a router. state: of the update that other is there for."""
    if state in BOTH_WANTED and other is not None:
        return tuple(sorted((served, other)))
    return (served,)


def _replicas_behind(view: UpdateView) -> list[MemberId]:
    """Routers in whose replica there is none of the new version yet."""
    ready = set(view.new_routers.values())
    return [router_id for router_id, replica in view.old_routers.items() if replica not in ready]
