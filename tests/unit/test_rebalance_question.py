"""The control plane asked which experts it would move."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from fake_world import MODEL, World, router, run, until

from cluster.config import ServiceConfig
from cluster.control.balancer import BalanceQuestion
from cluster.control.control_plane import ControlPlane
from cluster.control.membership import MemberId


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    world = World(ServiceConfig(model=str(tmp_path), shards=3, heartbeat_s=0.01))
    world.pool.num_free_slots = 9
    return world


def reason(found: dict[str, Any]) -> str:
    assert found["refusal"]["reason"] == "not_ready", found
    sentence: str = found["refusal"]["sentence"]
    return sentence


async def work(world: World, plane: ControlPlane) -> None:
    """The first shard has computed much, the others little."""
    world.now_s += 1.0
    for number, shard in enumerate(world.pool.shards.values()):
        rows = 400_000 if number == 0 else 20_000
        shard.load = [(slot.layer, slot.expert, rows) for slot in shard.slots]
    await until(lambda: len(plane.view()["load"]) == 8)


def test_it_says_which_experts_it_would_move(world: World) -> None:
    async def act() -> None:
        plane = await world.controller()
        await plane.join_router(router(), "p", world.values())
        runs = asyncio.create_task(plane.run())
        await work(world, plane)
        found = await plane.rebalancing.rebalance(dry_run=True)
        assert found["refusal"] is None, found
        assert found["after"]["imbalance"] < found["before"]["imbalance"]
        assert [shard["shard_id"] for shard in found["before"]["shards"]] == list(world.pool.shards)
        runs.cancel()

    run(act)


def test_it_moves_nothing_while_shards_start(world: World) -> None:
    async def act() -> None:
        world.pool.never_loads = True
        plane = await world.controller()
        assert reason(await plane.rebalancing.rebalance(dry_run=True)) == "the shards are not up yet"

    run(act)


def test_it_moves_nothing_where_routers_hold_the_experts(world: World) -> None:
    async def act() -> None:
        world.config = world.config.model_copy(update={"shards": 0})
        plane = await world.controller()
        await plane.join_router(router(), "p", world.values())
        assert "routers hold the experts themselves" in reason(await plane.rebalancing.rebalance(dry_run=True))

    run(act)


def test_it_moves_nothing_while_a_lost_shard_is_replaced(world: World) -> None:
    async def act() -> None:
        plane = await world.controller()
        await plane.join_router(router(), "p", world.values())
        runs = asyncio.create_task(plane.run())
        world.pool.never_loads = True
        victim = next(iter(world.pool.shards))
        world.pool.kill(victim)
        await until(lambda: any(shard["state"] == "dead" for shard in plane.view()["shards"]))
        assert reason(await plane.rebalancing.rebalance(dry_run=True)).startswith("not ready: ")
        runs.cancel()

    run(act)


def test_it_moves_nothing_while_an_epoch_is_prepared(world: World) -> None:
    async def act() -> None:
        plane = await world.controller()
        await plane.join_router(router(), "p", world.values())
        runs = asyncio.create_task(plane.run())
        for shard in world.pool.shards.values():
            shard.may_prepare.clear()
        world.pool.kill(next(iter(world.pool.shards)))
        await until(lambda: plane.state.preparing is not None)
        assert reason(await plane.rebalancing.rebalance(dry_run=True)) == "the next epoch is being prepared"
        runs.cancel()

    run(act)


def test_a_loss_that_is_made_good_stands_in_the_way_of_nothing(world: World) -> None:
    async def act() -> None:
        plane = await world.controller()
        await plane.join_router(router(), "p", world.values())
        plane.leave(MemberId("router-1"))
        runs = asyncio.create_task(plane.run())
        victim = next(iter(world.pool.shards))
        await until(lambda: all(shard["state"] == "ready" for shard in plane.view()["shards"]))
        world.now_s += 10.0
        world.pool.kill(victim)
        await until(lambda: victim not in plane.state.shard_ids and plane.state.preparing is None)
        await until(lambda: any(shard["state"] == "dead" for shard in plane.view()["shards"]))
        found = await plane.rebalancing.rebalance(dry_run=True)
        while found["refusal"]["reason"] == "not_ready":
            await asyncio.sleep(0.005)
            found = await plane.rebalancing.rebalance(dry_run=True)
        assert found["refusal"]["reason"] == "little_traffic"
        assert victim in [shard["id"] for shard in plane.view()["shards"]]
        runs.cancel()

    run(act)


def test_what_was_asked_of_other_shards_does_not_count(world: World) -> None:
    async def act() -> None:
        plane = await world.controller()
        await plane.join_router(router(), "p", world.values())
        runs = asyncio.create_task(plane.run())
        await work(world, plane)
        plane.leave(MemberId("router-1"))
        await plane.join_router(router(), "p", world.values(shards=2))
        await until(lambda: len(world.pool.shards) == 2)
        found = await plane.rebalancing.rebalance(dry_run=True)
        while found["refusal"] is not None and found["refusal"]["reason"] == "not_ready":
            await asyncio.sleep(0.005)
            found = await plane.rebalancing.rebalance(dry_run=True)
        assert found["refusal"]["reason"] == "little_traffic", found
        runs.cancel()

    run(act)


def test_however_many_ask_one_decision_is_made_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way: list[int] = []
    most: list[int] = []
    decide = BalanceQuestion.decide

    def slow(question: BalanceQuestion) -> Any:
        under_way.append(1)
        most.append(len(under_way))
        time.sleep(0.02)
        under_way.pop()
        return decide(question)

    monkeypatch.setattr(BalanceQuestion, "decide", slow)

    async def act() -> None:
        plane = await world.controller()
        await plane.join_router(router(), "p", world.values())
        runs = asyncio.create_task(plane.run())
        await work(world, plane)
        await asyncio.gather(*(plane.rebalancing.rebalance(dry_run=True) for _ in range(5)))
        assert most == [1] * 5
        runs.cancel()

    run(act)
