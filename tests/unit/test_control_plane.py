"""The control plane against a world of plain objects: what is decided, remembered and shown."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from fake_world import MODEL, FakePool, World, router, run, until
from log_records import recorded

from cluster.config import ServiceConfig
from cluster.control.control_plane import ControlPlane, RetiringError
from cluster.control.desired_state import decode_state
from cluster.control.member_report import MemberReport, OpenChoice
from cluster.control.membership import MemberId, MemberKind
from cluster.control.shard_fleet import StartError
from cluster.front.grpc_codec import requests_response
from cluster.metrics.definitions import ENGINE_STEPS
from cluster.metrics.merge import merge
from cluster.metrics.snapshot import Snapshot
from experts.epoch import Epoch


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return World(ServiceConfig(model=str(tmp_path), shards=3, heartbeat_s=0.01, app_gone_s=30.0))


def test_the_first_router_hears_of_epoch_1_once_every_shard_serves_it(world: World) -> None:
    async def act() -> None:
        plane = await world.controller()
        welcome = await plane.join_router(router(), "p", world.values())
        epoch = Epoch.from_dict(welcome["epoch"])
        assert epoch.number == 1
        assert [shard.epochs for shard in world.pool.shards.values()] == [[1], [1], [1]]
        assert len(epoch.placement.slots) == 2 * 4
        assert {shard.spec.slots for shard in world.pool.shards.values()} == set(
            epoch.placement.slots_by_shard.values()
        )
        assert welcome["config"]["dtype"] == "float32"
        assert welcome["config"]["max_model_len"] == 4096

    run(act)


def test_without_shards_a_router_holds_the_experts_and_reports_their_load(world: World) -> None:
    async def act() -> None:
        world.config = world.config.model_copy(update={"shards": 0})
        plane = await world.controller()
        welcome = await plane.join_router(router(), "p", world.values())
        assert welcome["epoch"] is None
        plane.heartbeat(router(), MemberReport(load=[(1, 2, 9)]))
        view = plane.view()
        assert (view["epoch"], view["shards"], view["load"]) == (1, [], [[1, 2, 9]])

    run(act)


def test_the_view_shows_slots_states_and_load(world: World) -> None:
    async def act() -> None:
        plane = await world.controller()
        await plane.join_router(router(), "p", world.values())
        for shard in world.pool.shards.values():
            shard.load = [(slot.layer, slot.expert, 1) for slot in shard.spec.slots[:1]]
        runs = asyncio.create_task(plane.run())
        await until(lambda: len(plane.view()["load"]) == 3)
        view = plane.view()
        assert view["controller"] == {"id": "controller-1", "pid": 1, "node": "n", "state": "ready"}
        assert [(shard["state"], shard["pid"]) for shard in view["shards"]] == [("ready", 7)] * 3
        slots = [tuple(slot) for shard in view["shards"] for slot in shard["slots"]]
        assert sorted(slots) == [(layer, expert) for layer in (1, 3) for expert in range(4)]
        runs.cancel()

    run(act)


def test_a_shard_that_dies_is_seen_dead_and_its_load_still_counts(world: World) -> None:
    async def act() -> None:
        plane = await world.controller()
        await plane.join_router(router(), "p", world.values())
        victim = next(iter(world.pool.shards))
        world.pool.shards[victim].load = [(1, 0, 5)]
        runs = asyncio.create_task(plane.run())
        await until(lambda: plane.view()["load"] == [[1, 0, 5]])
        del world.pool.shards[victim]
        await until(lambda: plane.view()["shards"][0]["state"] == "dead")
        world.now_s += 61.0
        await until(lambda: plane.view()["shards"][0]["id"] != victim)
        assert plane.view()["load"] == [[1, 0, 5]]
        runs.cancel()

    run(act)


def test_a_router_whose_process_ended_is_dead_and_one_that_is_silent_suspect(world: World) -> None:
    async def act() -> None:
        plane = await world.controller()
        for name in ("router-1", "router-2"):
            await plane.join_router(router(name), name, world.values())
        runs = asyncio.create_task(plane.run())
        world.probe.dead.add("router-1")
        world.now_s += 1.0
        await until(lambda: [member["state"] for member in plane.view()["routers"]] == ["dead", "suspect"])
        assert plane.heartbeat(router("router-2"), MemberReport())["num_ready_routers"] == 1
        runs.cancel()

    run(act)


def test_a_shard_that_cannot_load_fails_the_start_with_its_reason_and_leaves_nothing(world: World) -> None:
    async def act() -> None:
        world.pool.loading_error = "tensor x is missing"
        plane = await world.controller()
        with pytest.raises(StartError, match=r"shard-1-\w+: loading failed: tensor x is missing"):
            await plane.join_router(router(), "p", world.values())
        assert world.pool.shards == {}
        assert plane.state.shard_ids == ()

    run(act)


def test_a_failed_start_is_remembered_for_a_while_and_then_tried_anew(world: World) -> None:
    async def act() -> None:
        world.pool.loading_error = "tensor x is missing"
        plane = await world.controller()
        for _ in range(2):
            with pytest.raises(StartError):
                await plane.join_router(router(), "p", world.values())
        assert world.pool.num_created == 3
        world.pool.loading_error = None
        world.now_s += 11.0
        await plane.join_router(router(), "p", world.values())
        assert world.pool.num_created == 6

    run(act)


def test_a_shard_that_loads_for_too_long_is_named(world: World) -> None:
    async def act() -> None:
        world.config = world.config.model_copy(update={"start_timeout_s": 0.05})
        world.pool.never_loads = True
        plane = await world.controller()
        with pytest.raises(StartError, match=r"shard-\d-\w+: loading took longer than 0\.05 s"):
            await plane.join_router(router(), "p", world.values())

    run(act)


def test_a_reborn_controller_adopts_shards_and_keeps_epoch_and_secrets_in_a_new_term(world: World) -> None:
    async def act() -> None:
        first = await world.controller()
        before = await first.join_router(router(), "p", world.values())
        second = await world.controller()
        after = await second.join_router(router(), "p", world.values())
        assert world.pool.num_created == 3
        assert (after["epoch"], after["secret"]) == (before["epoch"], before["secret"])
        assert (before["term"], after["term"]) == (1, 2)
        assert second.state.admin_token == first.state.admin_token

    run(act)


def test_a_reborn_controller_learns_of_its_members_from_their_heartbeats(world: World) -> None:
    async def act() -> None:
        plane = await world.controller()
        assert plane.heartbeat(router(), MemberReport())["known"] is False
        plane.take_in(router(), "p")
        assert plane.heartbeat(router(), MemberReport())["known"] is True
        assert [member["id"] for member in plane.view()["routers"]] == ["router-1"]

    run(act)


def test_shards_created_but_not_yet_served_are_finished_by_the_next_controller(world: World) -> None:
    async def act() -> None:
        world.pool.never_loads = True
        first = await world.controller()
        await until(lambda: world.pool.num_created == 3)
        shards = world.pool.shards
        # The first controller is still there, but hears nothing any more.
        world.pool = FakePool()
        world.pool.shards = dict(list(shards.items())[1:])
        second = await world.controller()
        await second.join_router(router(), "p", world.values())
        assert world.pool.num_created == 1
        assert second.state.shard_ids == first.state.shard_ids
        assert set(world.pool.shards) == set(shards)

    run(act)


def test_an_application_gone_for_long_takes_everything_with_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.control.control_plane.APP_WATCH_PERIOD_S", 0.01)

    async def act() -> None:
        plane = await world.controller()
        await plane.join_router(router(), "p", world.values())
        ids = list(world.pool.shards)
        runs = asyncio.create_task(plane.run())
        world.now_s += 31.0
        assert not runs.done()
        world.apps.present = False
        while not runs.done():
            world.now_s += 31.0
            await asyncio.sleep(0.005)
        assert world.pool.shards == {}
        assert world.pool.drained == ids
        assert world.store.data is None
        with pytest.raises(RetiringError):
            plane.join_gateway(router(), "p")

    run(act)


def test_an_application_that_comes_back_configured_anew_gets_new_shards_under_a_new_epoch(world: World) -> None:
    async def act() -> None:
        plane = await world.controller()
        await plane.join_router(router(), "p", world.values())
        plane.leave(MemberId("router-1"))
        joins = (plane.join_router(router(f"router-{i}"), "p", world.values(shards=2)) for i in (2, 3))
        welcome, other = await asyncio.gather(*joins)
        assert welcome["epoch"]["number"] == other["epoch"]["number"] == 2
        assert len(world.pool.shards) == 2
        assert world.pool.num_created == 5

    run(act)


def test_shards_in_use_are_not_replaced_under_their_routers(world: World) -> None:
    async def act() -> None:
        plane = await world.controller()
        await plane.join_router(router(), "p", world.values())
        with pytest.raises(ValueError, match="other values of copies, shards: delete the application first"):
            await plane.join_router(router("router-2"), "p", world.values(shards=4, copies=2))
        assert len(world.pool.shards) == 3

    run(act)


def test_a_reborn_controller_waits_for_its_members_before_it_tells_numbers(world: World) -> None:
    async def act() -> None:
        first = await world.controller()
        await first.join_router(router(), "p", world.values())
        assert first.numbers() is not None, "a first controller has nobody to wait for"
        second = await world.controller()
        assert second.numbers() is None
        world.now_s += 1.0
        assert second.numbers() is not None

    run(act)


def test_what_a_dead_router_has_counted_outlives_it_and_the_controller(world: World) -> None:
    async def act() -> None:
        plane = await world.controller()
        runs = asyncio.create_task(plane.run())
        await plane.join_router(router(), "p", world.values())
        plane.heartbeat(router(), steps(5))
        assert num_steps(plane) == 5
        world.probe.dead.add("p")
        await until(lambda: plane.view()["routers"][0]["state"] == "dead")
        plane.heartbeat(router(), steps(9))
        assert num_steps(plane) == 5, "who is dead says nothing more"
        numbers = plane.numbers()
        assert numbers is not None
        assert "router-1" not in numbers.living, "and is not running anything"
        world.now_s += 61.0
        await until(lambda: plane.view()["routers"] == [])
        assert num_steps(plane) == 5
        await until(lambda: world.store.data is not None and decode_state(world.store.data).departed.numbers != {})
        runs.cancel()
        reborn = await world.controller()
        world.now_s += 1.0
        reborn.take_in(router("router-2"), "q", steps(1))
        assert num_steps(reborn) == 6

    run(act)


def test_a_member_that_leaves_says_a_last_word(world: World) -> None:
    async def act() -> None:
        plane = await world.controller()
        plane.join_gateway(gateway := replace(router("gateway-1"), kind=MemberKind.GATEWAY), "p")
        plane.heartbeat(gateway, steps(5))
        plane.leave(MemberId("gateway-1"), steps(7))
        assert num_steps(plane) == 7

    run(act)


def test_a_dead_member_is_logged_once(world: World) -> None:
    async def act() -> None:
        plane = await world.controller()
        runs = asyncio.create_task(plane.run())
        await plane.join_router(router(), "p", world.values())
        victim = next(iter(world.pool.shards))
        with recorded("arriero.controller", logging.ERROR) as lines:
            world.probe.dead.add("p")
            del world.pool.shards[victim]
            await until(lambda: len(lines) == 2)
            await asyncio.sleep(0.1)
        runs.cancel()
        assert sorted(line.getMessage() for line in lines) == [
            "router-1 died: its process has ended",
            f"{victim} died: killed",
        ]

    run(act)


def test_open_choices_are_told_with_their_gateway(world: World) -> None:
    async def act() -> None:
        plane = await world.controller()
        plane.join_gateway(gateway := replace(router("gateway-1"), kind=MemberKind.GATEWAY), "p")
        plane.heartbeat(gateway, MemberReport(open_choices=(CHOICE,), num_open_choices=3))
        world.now_s += 2.0
        found = plane.open_choices(10)
        assert found["num_open"] == 3
        [told] = requests_response(found).requests
        assert (told.request_id, told.gateway_id, told.router_id, told.age_s) == ("r", "gateway-1", "router-a", 5.0)

    run(act)


CHOICE = OpenChoice(
    request_id="r",
    choice_index=0,
    router_id="router-a",
    attempt=1,
    phase="decoding",
    age_s=3.0,
    idle_s=0.5,
    num_prompt_tokens=4,
    num_completion_tokens=5,
)


def steps(number: int) -> MemberReport:
    metrics = Snapshot()
    metrics.put(ENGINE_STEPS, number)
    return MemberReport(metrics=metrics)


def num_steps(plane: ControlPlane) -> float:
    numbers = plane.numbers()
    assert numbers is not None
    return merge(numbers).numbers[ENGINE_STEPS.name][()]
