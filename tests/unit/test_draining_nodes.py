"""Nodes that are to go: who lives there is shown as draining, and shards are moved while they serve."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_life import begin, running
from fake_world import MODEL, World, router, run, until

from cluster.config import ServiceConfig
from cluster.control.draining_nodes import MustMoveError
from cluster.control.member_report import MemberReport


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    # The world's clock outruns the looks, and nobody shall be suspect for that.
    monkeypatch.setattr("cluster.control.control_plane.SUSPECT_AFTER_HEARTBEATS", 400)
    monkeypatch.setattr("cluster.control.draining_nodes.LOOK_S", 0.005)
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return World(ServiceConfig(model=str(tmp_path), shards=2, heartbeat_s=0.01))


@pytest.mark.parametrize("is_told_by", ["node", "process"])
def test_a_shard_that_must_leave_is_replaced_and_serves_until_then(world: World, is_told_by: str) -> None:
    async def act() -> None:
        life = await begin(world)
        first, second = world.pool.shards
        world.pool.shards[second].node_id = "old"
        with running(life.plane):
            world.pool.never_loads = True
            if is_told_by == "node":
                world.nodes.leaving = frozenset({"old"})
            else:
                world.pool.shards[second].is_leaving = True
            await life.until(lambda: len(world.pool.shards) == 3)
            await life.until(lambda: "draining" in states(life.plane.view()["shards"]))
            assert life.epoch.number == 1, "nothing has moved yet"
            assert second in life.epoch.placement.slots_by_shard
            world.pool.never_loads = False
            await life.until(lambda: life.is_whole() and second not in world.pool.shards)
        assert first in world.pool.shards
        assert life.epoch.number == 2
        assert life.routers[0].used == [1, 2]

    run(act)


def states(members: list[dict[str, str]]) -> set[str]:
    return {member["state"] for member in members}


def test_members_on_a_node_that_is_to_go_are_draining_and_gateways_hear_of_it(world: World) -> None:
    async def act() -> None:
        life = await begin(world, num_routers=2)
        plane = life.plane
        life.routers[0].member = replace(router("router-0"), node_id="old")
        with running(plane):
            await life.until(lambda: states(plane.view()["routers"]) == {"ready"})
            world.nodes.leaving = frozenset({"old"})
            await life.until(lambda: states(plane.view()["routers"]) == {"ready", "draining"})
            answer = plane.heartbeat(life.routers[1].member, MemberReport())
            assert answer["draining_nodes"] == ["old"]
            assert answer["num_ready_routers"] == 2, "it serves, and is asked where there is no other"
            world.nodes.leaving = None
            num_asked = world.nodes.num_asked
            await life.until(lambda: world.nodes.num_asked > num_asked + 1)
            assert states(plane.view()["routers"]) == {"ready", "draining"}, "silence is no news"
            world.nodes.leaving = frozenset()
            await life.until(lambda: states(plane.view()["routers"]) == {"ready"})

    run(act)


def test_the_controller_itself_leaves_a_node_that_is_to_go_if_there_is_another(world: World) -> None:
    async def act() -> None:
        plane = await world.controller()
        world.nodes.leaving, world.nodes.has_others = frozenset({"n"}), False
        runs = asyncio.create_task(plane.run())
        await until(lambda: world.nodes.num_asked > 2)
        assert not runs.done()
        world.nodes.has_others = True
        with pytest.raises(MustMoveError, match="node n is to go"):
            await runs

    run(act)
