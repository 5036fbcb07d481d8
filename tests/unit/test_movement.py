"""A rebalance that is carried out, in a plain world: taken up epoch by epoch, or given up without a trace."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fake_life import Life, begin, running
from fake_world import MODEL, World, router, run

from cluster.config import ServiceConfig
from cluster.control.desired_state import target_of
from cluster.control.membership import MemberId
from experts.placement import ShardId

STALL_S = 2.0


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    world = World(ServiceConfig(model=str(tmp_path), shards=3, heartbeat_s=0.01, rebalance_stall_s=STALL_S))
    world.pool.num_free_slots = 9
    return world


@pytest.fixture(autouse=True)
def _time_runs_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The world's clock outruns the looks, and nobody shall be suspect for that."""
    monkeypatch.setattr("cluster.control.control_plane.SUSPECT_AFTER_HEARTBEATS", 4000)
    monkeypatch.setattr("cluster.control.rebalancing.LOOK_S", 0.02)


def scenario(act: Callable[[World], Awaitable[None]]) -> Callable[[World], None]:
    def test(world: World) -> None:
        run(lambda: act(world))

    test.__name__ = act.__name__
    return test


async def work(life: Life, *, hot_rows: int = 400_000) -> None:
    """The first shard computes hot_rows for each of its slots, the others few."""
    await life.until(lambda: life.world.now_s > 1.0)
    for number, shard in enumerate(life.world.pool.shards.values()):
        rows = hot_rows if number == 0 else 20_000
        shard.load = [(slot.layer, slot.expert, rows) for slot in shard.spec.slots]
    await life.until(lambda: len(life.plane.view()["load"]) == 8)


async def rebalance(life: Life) -> dict[str, Any]:
    answer = await life.plane.rebalancing.rebalance(dry_run=False)
    assert answer["refusal"] is None, answer
    assert answer["stages"]
    return answer


def state(life: Life) -> str:
    progress = life.plane.rebalancing.progress("")
    return "unknown" if progress is None else str(progress["state"])


def held(life: Life) -> dict[ShardId, set[Any]]:
    return {shard: set(slots) for shard, slots in life.epoch.placement.slots_by_shard.items()}


def is_as_before(life: Life, before: dict[ShardId, set[Any]]) -> bool:
    target = target_of(life.plane.state.target).slots_by_shard
    return held(life) == before == {shard: set(slots) for shard, slots in target.items()}


def hold_up(life: Life) -> None:
    for shard in life.world.pool.shards.values():
        shard.may_prepare.clear()


def let_go(life: Life) -> None:
    for shard in life.world.pool.shards.values():
        shard.may_prepare.set()


@scenario
async def test_its_stages_come_into_force_and_are_what_should_be_from_then_on(world: World) -> None:
    life = await begin(world, num_routers=2)
    with running(life.plane):
        await work(life)
        answer = await rebalance(life)
        await life.until(lambda: state(life) != "moving")
        assert life.plane.rebalancing.progress(answer["rebalance_id"]) == {
            "rebalance_id": answer["rebalance_id"],
            "state": "done",
            "num_stages": len(answer["stages"]),
            "num_stages_done": len(answer["stages"]),
            "reason": "",
            "epoch": 1 + len(answer["stages"]),
        }
        assert life.is_whole()
        for stage in answer["stages"]:
            for placed in stage["additions"]:
                assert (placed["layer"], placed["expert"]) in held(life)[placed["shard_id"]]
        moved = held(life)
        assert is_as_before(life, moved)
        again = await life.plane.rebalancing.rebalance(dry_run=False)
        assert again["refusal"]["reason"] in ("even", "does_not_pay", "nothing_helps"), again
        await life.until(lambda: world.now_s > 30.0, dt_s=0.2)
        assert is_as_before(life, moved), "nothing goes back by itself"


@scenario
async def test_one_that_stands_still_is_rolled_back_and_not_tried_again(world: World) -> None:
    life = await begin(world)
    with running(life.plane):
        await work(life)
        before = held(life)
        hold_up(life)
        await rebalance(life)
        began_s = world.now_s
        await life.until(lambda: state(life) != "moving")
        assert world.now_s - began_s >= STALL_S
        progress = life.plane.rebalancing.progress("")
        assert progress is not None
        assert (progress["state"], progress["num_stages_done"]) == ("given_up", 0)
        assert "nothing has moved forward for 2 s: shard-" in progress["reason"]
        assert "has not loaded" in progress["reason"]
        let_go(life)
        await life.until(life.is_whole)
        await life.until(lambda: world.now_s > began_s + 40.0, dt_s=0.2)
    assert is_as_before(life, before)
    assert life.epoch.number == 1
    assert life.routers[0].used == [1]


@scenario
async def test_one_that_is_slow_but_goes_on_is_let_go_on(world: World) -> None:
    life = await begin(world)
    with running(life.plane):
        await work(life)
        hold_up(life)
        await rebalance(life)
        slow = next(iter(world.pool.shards.values()))
        for _ in range(4):
            slow.num_loaded += 1
            until_s = world.now_s + 0.7 * STALL_S
            await life.until(lambda until_s=until_s: world.now_s > until_s)  # type: ignore[misc]
            assert state(life) == "moving"
        let_go(life)
        await life.until(lambda: state(life) == "done")


@scenario
async def test_one_that_a_shard_cannot_load_is_given_up_with_its_reason(world: World) -> None:
    life = await begin(world)
    with running(life.plane):
        await work(life)
        before = held(life)
        for shard in world.pool.shards.values():
            shard.error = "no memory left"
        await rebalance(life)
        await life.until(lambda: state(life) == "given_up")
        progress = life.plane.rebalancing.progress("")
        assert progress is not None
        assert progress["reason"].endswith("no memory left")
        await life.until(life.is_whole)
    assert is_as_before(life, before)


@scenario
async def test_one_gives_way_to_a_loss_and_what_is_lost_is_replaced_as_it_was(world: World) -> None:
    life = await begin(world)
    with running(life.plane):
        await work(life)
        before = held(life)
        hold_up(life)
        await rebalance(life)
        await life.until(lambda: life.plane.state.preparing is not None)
        victim = list(world.pool.shards)[1]
        world.pool.kill(victim)
        let_go(life)
        await life.until(lambda: state(life) == "given_up" and life.is_whole())
    assert sorted(map(sorted, held(life).values())) == sorted(map(sorted, before.values()))


@scenario
async def test_one_gives_way_to_another_number_of_shards(world: World) -> None:
    life = await begin(world)
    with running(life.plane):
        await work(life)
        hold_up(life)
        await rebalance(life)
        await life.until(lambda: life.plane.state.preparing is not None)
        wanted = await life.plane.scale_shards(2)
        let_go(life)
        await life.until(lambda: life.is_whole() and set(world.pool.shards) == set(wanted))
        progress = life.plane.rebalancing.progress("")
    assert progress is not None
    assert (progress["state"], progress["reason"]) == (
        "given_up",
        "what the shards should hold has changed meanwhile",
    )
    assert sum(map(len, held(life).values())) == 8


@scenario
async def test_a_reborn_controller_knows_nothing_of_it_and_all_is_as_it_was(world: World) -> None:
    life = await begin(world)
    with running(life.plane):
        await work(life)
        before = held(life)
        hold_up(life)
        answer = await rebalance(life)
        await life.until(lambda: (1, 2) in life.routers[0].offered)
    let_go(life)
    life.plane = life.routers[0].plane = await world.controller()
    await life.plane.join_router(router("router-late"), "late", world.values())
    life.plane.leave(MemberId("router-late"))
    with running(life.plane):
        await life.until(lambda: world.now_s > 10.0 and life.is_whole(), dt_s=0.05)
    assert life.plane.rebalancing.progress(answer["rebalance_id"]) is None
    assert is_as_before(life, before)
    assert life.routers[0].used == [1]


@scenario
async def test_while_one_is_under_way_another_is_refused(world: World) -> None:
    life = await begin(world)
    with running(life.plane):
        await work(life)
        hold_up(life)
        first = await rebalance(life)
        for dry_run in (True, False):
            answer = await life.plane.rebalancing.rebalance(dry_run=dry_run)
            assert answer["refusal"]["reason"] == "not_ready"
            assert answer["refusal"]["sentence"] == f"{first['rebalance_id']} is under way"
        assert life.plane.rebalancing.progress("rebalance-other") is None


@scenario
async def test_an_even_load_moves_nothing(world: World) -> None:
    world.config = world.config.model_copy(update={"shards": 2})
    life = await begin(world)
    with running(life.plane):
        await work(life, hot_rows=20_000)
        answer = await life.plane.rebalancing.rebalance(dry_run=False)
        assert (answer["refusal"]["reason"], answer["rebalance_id"]) == ("even", ""), answer
        assert state(life) == "unknown"


@scenario
async def test_a_shard_that_dies_afterwards_is_replaced_with_what_it_was_given(world: World) -> None:
    life = await begin(world)
    with running(life.plane):
        await work(life)
        await rebalance(life)
        await life.until(lambda: state(life) == "done")
        moved = held(life)
        world.pool.kill(next(iter(world.pool.shards)))
        await life.until(lambda: life.is_whole() and life.epoch.number > 2)
    assert sorted(map(sorted, held(life).values())) == sorted(map(sorted, moved.values()))


@scenario
async def test_where_a_period_is_set_the_service_does_it_by_itself_and_does_not_do_it_again(world: World) -> None:
    world.config = world.config.model_copy(update={"rebalance_period_s": 0.02})
    life = await begin(world)
    with running(life.plane):
        await work(life)
        await life.until(lambda: state(life) == "done")
        name = life.plane.rebalancing.progress("")
        began_s = world.now_s
        await life.until(lambda: world.now_s > began_s + 2.0)
        assert life.plane.rebalancing.progress("") == name


@scenario
async def test_by_default_nothing_moves_by_itself(world: World) -> None:
    life = await begin(world)
    with running(life.plane):
        await work(life)
        began_s = world.now_s
        await life.until(lambda: world.now_s > began_s + 2.0)
        assert state(life) == "unknown"
