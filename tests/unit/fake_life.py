"""A control plane that runs in the plain world, with routers that follow its offers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fake_world import World, router

from cluster.control.control_plane import ControlPlane
from cluster.control.member_report import MemberReport
from experts.epoch import Epoch

ALL_SLOTS = {(layer, expert) for layer in (1, 3) for expert in range(4)}


class FakeRouter:
    """Does what routers do with an offer, unless it sleeps."""

    def __init__(self, plane: ControlPlane, name: str = "router-1", *, weights_version: int = 1) -> None:
        self.plane = plane
        self.weights_version = weights_version
        self.replica = f"replica of {name}"
        self.member = router(name)
        self.epoch = 1
        self.prepared: int | None = None
        self.lost: dict[str, str] = {}
        self.unreachable: dict[str, str] = {}
        self.used: list[int] = [1]
        self.offered: list[tuple[int, int | None]] = []

    @property
    def lanes(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch, "prepared": self.prepared, "lost": self.lost, "unreachable": self.unreachable,
        }  # fmt: skip

    def member_report(self) -> MemberReport:
        return MemberReport(
            lanes=self.lanes,
            weights_version=self.weights_version,
            replica=self.replica,
            resident_bytes=1 << 20,
            num_free_bytes=1 << 40,
        )

    def report(self) -> dict[str, Any]:
        answer = self.plane.heartbeat(self.member, self.member_report())
        if not answer["known"]:
            self.plane.take_in(self.member, self.member.member_id)
        offer: dict[str, Any] = answer["offer"]
        self.offered.append((answer["term"], offer["preparing"]))
        self.follow(offer)
        return offer

    def follow(self, offer: dict[str, Any]) -> None:
        if offer["prepare"] is not None:
            self.prepared = offer["prepare"]["number"]
        if self.prepared == offer["in_force"]:
            self.epoch, self.prepared, self.lost = offer["in_force"], None, {}
            self.used.append(self.epoch)


class Life:
    """A plane that runs, its time and its routers' reports moving on."""

    def __init__(self, world: World, plane: ControlPlane, *routers: FakeRouter) -> None:
        self.world, self.plane, self.routers = world, plane, list(routers)

    async def until(self, condition: Callable[[], bool], *, dt_s: float = 0.02) -> None:
        while not condition():
            for each in self.routers:
                each.report()
            self.world.now_s += dt_s
            await asyncio.sleep(0.002)

    @property
    def epoch(self) -> Epoch:
        assert self.plane.state.epoch is not None
        return Epoch.from_dict(self.plane.state.epoch)

    def is_whole(self) -> bool:
        """All living shards serve the epoch in force and no other, each slot is placed, and nothing is left over."""
        epoch, shards = self.epoch, self.world.pool.shards
        return (
            set(epoch.placement.slots_by_shard) == set(shards) == set(self.plane.state.shard_ids)
            and all(shard.epochs == [epoch.number] for shard in shards.values())
            and set(epoch.placement.slots) == ALL_SLOTS
            and all(each.epoch == epoch.number for each in self.routers)
        )


@contextmanager
def running(plane: ControlPlane) -> Iterator[None]:
    task = asyncio.create_task(plane.run())
    try:
        yield
    finally:
        task.cancel()


async def begin(world: World, num_routers: int = 1) -> Life:
    plane = await world.controller()
    names = [f"router-{index}" for index in range(num_routers)]
    for name in names:
        await plane.join_router(router(name), name, world.values())
    return Life(world, plane, *(FakeRouter(plane, name) for name in names))
