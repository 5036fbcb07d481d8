"""The number of shards follows the load: one at a time, within bounds, and not while another change is under way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_world import MODEL, FakeStore, World, router, run, until

from cluster.balance.autoscaler import Trend
from cluster.config import ServiceConfig
from cluster.control.control_plane import ControlPlane
from cluster.control.desired_state import Memory
from cluster.control.epoch_keeper import EpochKeeper, UnrestError
from cluster.control.growth import GrowthState, told
from cluster.control.shard_fleet import ShardReport
from cluster.control.shard_growth import ShardGrowth
from cluster.control.shard_work import ShardWork
from experts.placement import ShardId

UP_S, DOWN_S = 5.0, 8.0
CONFIG = ServiceConfig(model="m", shards=2, max_shards=4, shard_up_delay_s=UP_S, shard_down_delay_s=DOWN_S)
REPORT = ShardReport(
    pid=1,
    node_id="n",
    load=(),
    epochs={},
    memory_pool="n",
    num_free_slots=0,
    num_loaded=0,
    work=ShardWork(by_slot={}, busy_s=0.0, speed=None),
)


@dataclass
class FakeKeeper:
    """Every step is done at once."""

    memory: Memory
    reason: str | None = None
    refusal: Exception | None = None

    def unrest(self) -> str | None:
        return self.reason

    async def scale(self, num_shards: int, *, only_at_rest: bool = False) -> tuple[ShardId, ...]:
        if only_at_rest and self.refusal is not None:
            raise self.refusal
        await self.memory.change(target={f"shard-{index}": [] for index in range(num_shards)})
        return ()


class Scene:
    """Seconds pass, each shard computes a part of each, and the growth has a look."""

    def __init__(self, memory: Memory, config: ServiceConfig = CONFIG) -> None:
        self.now_s = 0.0
        self.busy_s = 0.0
        self.memory = memory
        self.keeper = FakeKeeper(memory)
        tier = SimpleNamespace(config=config, keeper=self.keeper)
        self.growth = ShardGrowth(cast(Any, tier), memory, clock=lambda: self.now_s)

    @classmethod
    async def begin(cls, config: ServiceConfig = CONFIG) -> Scene:
        memory = await Memory.open(FakeStore(), config.model_dump())
        scene = cls(memory, config)
        await scene.keeper.scale(config.shards)
        return scene

    @property
    def num_shards(self) -> int:
        return len(self.memory.state.target)

    async def pass_by(self, num_s: int, *, busy: float) -> list[int]:
        """How many shards there were at each second's end."""
        counts = []
        for _ in range(num_s):
            self.now_s += 1.0
            self.busy_s += busy
            for name in self.memory.state.target:
                work = replace(REPORT.work, busy_s=self.busy_s)
                self.growth.note(ShardId(name), replace(REPORT, work=work))
            await self.growth.look(cast(EpochKeeper, self.keeper))
            counts.append(self.num_shards)
        return counts


def test_busy_shards_become_more_up_to_the_bound_and_idle_ones_fewer_down_to_the_other() -> None:
    async def act() -> None:
        scene = await Scene.begin()
        grown = await scene.pass_by(40, busy=0.9)
        assert sorted({*grown}) == [2, 3, 4]
        assert grown == sorted(grown)
        assert grown.count(3) >= UP_S, "each step waits anew"
        shrunk = await scene.pass_by(60, busy=0.1)
        assert sorted({*shrunk}) == [2, 3, 4]
        assert shrunk == sorted(shrunk, reverse=True)

    run(act)


def test_shards_as_busy_as_they_should_be_stay() -> None:
    async def act() -> None:
        scene = await Scene.begin()
        assert {*await scene.pass_by(40, busy=0.55)} == {2}
        growth = scene.growth.growth.to_dict()
        assert (growth["state"], growth["least"], growth["most"]) == ("steady", 2, 4)
        assert growth["busy"] == pytest.approx(0.55)

    run(act)


def test_what_an_operator_asks_for_is_the_least_from_then_on() -> None:
    async def act() -> None:
        scene = await Scene.begin()
        await scene.growth.scale(3)
        assert {*await scene.pass_by(60, busy=0.0)} == {3}
        await scene.growth.scale(5)
        assert {*await scene.pass_by(60, busy=0.9)} == {5}, "nor does the bound take any of them"
        assert (scene.growth.growth.least, scene.growth.growth.most) == (5, 5)
        await scene.growth.scale(1)
        assert max(await scene.pass_by(60, busy=0.9)) == 4

    run(act)


def test_nothing_is_decided_while_another_change_is_under_way_and_the_delay_begins_after_it() -> None:
    async def act() -> None:
        scene = await Scene.begin()
        scene.keeper.reason = "epoch 7 is being prepared"
        assert {*await scene.pass_by(40, busy=0.9)} == {2}
        assert scene.growth.growth.why == "epoch 7 is being prepared"
        scene.keeper.reason = None
        assert {*await scene.pass_by(int(UP_S), busy=0.9)} == {2}
        assert scene.growth.growth.state is GrowthState.TOO_BUSY
        assert max(await scene.pass_by(2, busy=0.9)) == 3

    run(act)


@pytest.mark.parametrize("refusal", [UnrestError("a rebalance has begun"), ValueError("shards must be at most 2")])
def test_a_step_that_is_refused_is_told_and_tried_again(refusal: Exception) -> None:
    async def act() -> None:
        scene = await Scene.begin()
        scene.keeper.refusal = refusal
        assert {*await scene.pass_by(int(UP_S) + 2, busy=0.9)} == {2}
        assert (scene.growth.growth.state, scene.growth.growth.why) == (GrowthState.WAITS, str(refusal))
        scene.keeper.refusal = None
        assert max(await scene.pass_by(int(UP_S) + 2, busy=0.9)) == 3

    run(act)


def test_without_a_bound_the_number_is_the_operators_alone() -> None:
    async def act() -> None:
        scene = await Scene.begin(CONFIG.model_copy(update={"max_shards": None}))
        assert {*await scene.pass_by(40, busy=0.9)} == {2}
        growth = scene.growth.growth
        assert (growth.state, growth.least, growth.most) == (GrowthState.OFF, 2, 2)
        await scene.growth.scale(1)
        assert {*await scene.pass_by(40, busy=0.9)} == {1}

    run(act)


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return World(ServiceConfig(model=str(tmp_path), shards=2, max_shards=4, heartbeat_s=0.01))


def running(world: World, act: Callable[[ControlPlane], Awaitable[None]]) -> None:
    async def whole() -> None:
        plane = await world.controller()
        await plane.join_router(router(), "p", world.values())
        runs = asyncio.create_task(plane.run())
        try:
            await act(plane)
        finally:
            runs.cancel()

    run(whole)


def test_the_controller_looks_by_itself_and_remembers_what_the_operator_has_asked_for(world: World) -> None:
    async def act(plane: ControlPlane) -> None:
        await until(lambda: "not known yet" in plane.view()["shard_growth"]["why"])
        await plane.scale_shards(3)
        await until(lambda: sum(bool(shard["slots"]) for shard in plane.view()["shards"]) == 3)
        reborn = (await world.controller()).view()["shard_growth"]
        assert (reborn["least"], reborn["most"]) == (3, 4)

    running(world, act)


@pytest.mark.parametrize(
    ("arguments", "state"),
    [
        ((Trend(), 0.5, None), GrowthState.STEADY),
        ((Trend(too_busy_since_s=1.0), 0.9, None), GrowthState.TOO_BUSY),
        ((Trend(too_idle_since_s=1.0), 0.1, None), GrowthState.TOO_IDLE),
        ((Trend(), None, None), GrowthState.WAITS),
        ((Trend(too_busy_since_s=1.0), 0.9, "not ready: a"), GrowthState.WAITS),
    ],
)
def test_an_operator_hears_why(arguments: Any, state: GrowthState) -> None:
    assert told(*arguments)[0] is state
    assert told(*arguments)[1]
