"""What the controller knows when it decides about epochs: the one in force, the one in preparation, who serves and
who uses which. Plain data; times are seconds of the controller's clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.control.membership import MemberId, MemberState
from cluster.control.movement import Movement
from experts.placement import ExpertPlacement, ShardId

LEASE_S = 3.0
"""A router that has been silent for longer may lose the epoch it uses; it then meets refusals, never wrong rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardView:
    """epochs: those it serves. num_free_slots: how many more fit into memory_pool, which shards may share.
    seen_s: when it last answered. num_loaded: slots it was given since it started. must_leave: its node is to go, or
    its process was told to end; is_pressed: and the one in its place takes long. rests: it was lost before it had ever
    served, and is not replaced just yet."""

    state: MemberState
    epochs: frozenset[int] = frozenset()
    memory_pool: str = ""
    num_free_slots: int = 0
    seen_s: float = 0.0
    num_loaded: int = 0
    must_leave: bool = False
    is_pressed: bool = False
    rests: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterView:
    """epoch: the one it uses. prepared: the one it could adopt at once, whose shards in unreachable it cannot
    connect to. masked: shards it has given up in its epoch, told at masked_s."""

    epoch: int
    lease_until_s: float
    prepared: int | None = None
    unreachable: frozenset[ShardId] = frozenset()
    masked: frozenset[ShardId] = frozenset()
    masked_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """An epoch that nobody uses yet. is_repair: it makes good a loss, so it is not given up for a router that cannot
    reach one of its shards. is_move: a stage of the movement. ready: shards that serve it. failure: why it must be
    given up."""

    number: int
    placement: ExpertPlacement
    is_repair: bool
    is_move: bool = False
    ready: frozenset[ShardId] = frozenset()
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochView:
    """target: what each desired shard should hold once all is well. settled: this controller has been there for a
    lease, so every router that lives has told it which epoch it uses. may_prepare: the last attempts did not fail
    just now. may_rejoin: the last epoch is old enough to make another one for the links' sake alone. movement: the
    last rebalance, under way or over.

    All of it is of one weights version. leads: that is the one that is served, by which shards are replaced and
    removed; used_elsewhere: shards that epochs of another version need."""

    now_s: float
    number: int
    placement: ExpertPlacement
    target: ExpertPlacement
    shards: Mapping[ShardId, ShardView]
    routers: Mapping[MemberId, RouterView] = field(default_factory=dict)
    preparing: Preparation | None = None
    settled: bool = True
    may_prepare: bool = True
    may_rejoin: bool = True
    movement: Movement | None = None
    leads: bool = True
    used_elsewhere: frozenset[ShardId] = frozenset()

    def state(self, shard_id: ShardId) -> MemberState:
        """A shard that is not known has ended, or was never made."""
        view = self.shards.get(shard_id)
        return MemberState.DEAD if view is None else view.state

    def is_ready(self, shard_id: ShardId) -> bool:
        return self.state(shard_id) is MemberState.READY

    @property
    def leased(self) -> tuple[RouterView, ...]:
        """The routers that must be waited for."""
        return tuple(router for router in self.routers.values() if router.lease_until_s >= self.now_s)

    @property
    def epochs_in_use(self) -> frozenset[int]:
        return frozenset(router.epoch for router in self.leased)

    @property
    def masked(self) -> frozenset[ShardId]:
        """Shards that a router does without in the epoch in force."""
        routers = (router for router in self.leased if router.epoch == self.number)
        return frozenset(shard_id for router in routers for shard_id in router.masked)
