"""The controller keeps its shards whole: losses, replacements, epochs and its own rebirth, in a plain world."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from fake_life import ALL_SLOTS, Life, begin, running
from fake_world import MODEL, World, router, run

from cluster.config import ServiceConfig
from cluster.control.membership import MemberId
from experts.placement import ShardId


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return World(ServiceConfig(model=str(tmp_path), shards=2, heartbeat_s=0.01))


@pytest.fixture(autouse=True)
def _time_runs_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The world's clock outruns the looks, and nobody shall be suspect for that."""
    monkeypatch.setattr("cluster.control.control_plane.SUSPECT_AFTER_HEARTBEATS", 400)


def scenario(act: Callable[[World], Awaitable[None]]) -> Callable[[World], None]:
    def test(world: World) -> None:
        run(lambda: act(world))

    test.__name__ = act.__name__
    return test


@scenario
async def test_a_dead_shard_is_replaced_under_another_name_and_epoch(world: World) -> None:
    life = await begin(world)
    first, second = world.pool.shards
    with running(life.plane):
        world.pool.kill(second)
        await life.until(lambda: life.epoch.number == 2 and life.is_whole())
    assert set(world.pool.shards) - {first, second}
    kept = life.epoch.placement.slots_by_shard[first]
    assert set(kept) == set(world.pool.shards[first].spec.slots), "what is well placed stays"
    assert life.routers[0].used == [1, 2]
    view = {shard["id"]: shard["state"] for shard in life.plane.view()["shards"]}
    assert view[second] == "dead"
    assert list(view.values()).count("ready") == 2


@scenario
async def test_survivors_with_room_take_over_until_the_replacement_has_loaded(world: World) -> None:
    life = await begin(world)
    first, second = world.pool.shards
    world.pool.num_free_slots = 100
    with running(life.plane):
        await life.until(lambda: world.now_s > 0.05)
        world.pool.never_loads = True
        world.pool.kill(second)
        await life.until(lambda: life.epoch.number == 2 and life.routers[0].epoch == 2)
        assert set(life.epoch.placement.slots_by_shard) == {first}
        assert set(life.epoch.placement.slots) == ALL_SLOTS
        world.pool.never_loads = False
        await life.until(lambda: life.epoch.number == 3 and life.is_whole())
    assert len(life.epoch.placement.slots_by_shard[first]) == 4


@scenario
async def test_all_shards_at_once_are_replaced_and_each_slot_comes_back(world: World) -> None:
    life = await begin(world, num_routers=2)
    with running(life.plane):
        for shard_id in list(world.pool.shards):
            world.pool.kill(shard_id)
        await life.until(life.is_whole)
    assert life.epoch.number >= 2


@scenario
async def test_a_replacement_that_dies_is_replaced_and_shards_that_keep_dying_get_ever_longer_rests(
    world: World,
) -> None:
    life = await begin(world)
    victim = list(world.pool.shards)[1]
    with running(life.plane):
        world.pool.loading_error = "no weights"
        world.pool.kill(victim)
        await life.until(lambda: world.now_s > 20.0, dt_s=0.05)
        assert 3 <= world.pool.num_created - 2 <= 6
        world.pool.loading_error = None
        await life.until(life.is_whole, dt_s=0.05)


@scenario
async def test_a_shard_that_cannot_prepare_aborts_the_epoch_and_its_number_is_never_used_again(world: World) -> None:
    life = await begin(world)
    first, second = world.pool.shards
    with running(life.plane):
        world.pool.shards[first].error = "b: no memory left"
        world.pool.kill(second)
        await life.until(lambda: f"retire 2 in term {life.plane.state.term}" in world.pool.shards[first].heard)
        assert life.epoch.number == 1
        assert life.plane.state.preparing is None
        world.pool.shards[first].error = None
        await life.until(life.is_whole, dt_s=0.05)
    assert life.epoch.number > 2
    assert 2 not in life.routers[0].used


@scenario
async def test_a_shard_that_dies_while_an_epoch_is_prepared_aborts_it_and_the_next_one_knows(world: World) -> None:
    world.config = world.config.model_copy(update={"shards": 3})
    life = await begin(world)
    _first, second, third = world.pool.shards
    with running(life.plane):
        world.pool.shards[third].may_prepare.clear()
        world.pool.kill(second)
        await life.until(lambda: any(heard.startswith("prepare 2") for heard in world.pool.shards[third].heard))
        world.pool.kill(third)
        await life.until(life.is_whole)
    assert len(world.pool.shards) == 3
    assert life.routers[0].used[1:] == [life.epoch.number]


@scenario
async def test_an_old_epoch_is_kept_for_a_router_that_uses_it_until_its_lease_is_over(world: World) -> None:
    life = await begin(world, num_routers=2)
    _first, second = world.pool.shards
    with running(life.plane):
        await life.until(lambda: world.now_s > 3.1, dt_s=0.05)
        sleeper = life.routers.pop()
        sleeper.report()
        world.pool.kill(second)
        began_s = world.now_s
        await life.until(lambda: life.routers[0].epoch == 2, dt_s=0.02)
        assert world.now_s - began_s >= 3.0, "it is also waited for before the commit"
        await life.until(life.is_whole)
        sleeper.report()
        assert sleeper.report()["in_force"] == 2
        assert sleeper.epoch == 2


@scenario
async def test_a_router_that_is_dead_is_not_waited_for(world: World) -> None:
    life = await begin(world, num_routers=2)
    with running(life.plane):
        await life.until(lambda: world.now_s > 3.1, dt_s=0.05)
        dead = life.routers.pop()
        dead.report()
        world.probe.dead.add(dead.member.member_id)
        world.pool.kill(list(world.pool.shards)[1])
        began_s = world.now_s
        await life.until(lambda: life.epoch.number == 2)
        assert world.now_s - began_s < 2.9


@scenario
async def test_a_shard_that_stalled_rejoins_by_a_new_epoch_and_is_never_replaced(world: World) -> None:
    world.config = world.config.model_copy(update={"copies": 2})
    life = await begin(world)
    first, second = world.pool.shards
    with running(life.plane):
        await life.until(lambda: world.now_s > 0.05)
        world.pool.shards[second].is_silent = True
        life.routers[0].lost = {second: "no answer within 0.5 s"}
        await life.until(
            lambda: {s["id"]: s["state"] for s in life.plane.view()["shards"]}[second] == "suspect", dt_s=0.05
        )
        assert life.epoch.number == 1
        world.pool.shards[second].is_silent = False
        await life.until(lambda: life.routers[0].epoch == 2)
        await life.until(life.is_whole)
    assert set(world.pool.shards) == {first, second}
    assert world.pool.num_created == 2


@scenario
async def test_what_a_stalled_shard_holds_alone_is_taken_over_and_given_back(world: World) -> None:
    life = await begin(world)
    first, second = world.pool.shards
    world.pool.num_free_slots = 100
    with running(life.plane):
        await life.until(lambda: world.now_s > 0.05)
        world.pool.shards[second].is_silent = True
        life.routers[0].lost = {second: "no answer within 0.5 s"}
        await life.until(lambda: life.routers[0].epoch == 2, dt_s=0.05)
        assert len(life.epoch.placement.slots_by_shard[first]) == 8
        world.pool.shards[second].is_silent = False
        await life.until(lambda: life.epoch.number >= 3 and life.is_whole(), dt_s=0.01)
    assert len(life.epoch.placement.slots_by_shard[first]) == 4
    assert set(world.pool.shards) == {first, second}


@scenario
async def test_a_reborn_controller_gives_up_what_was_only_prepared_and_goes_on(world: World) -> None:
    life = await begin(world)
    first, second = world.pool.shards
    with running(life.plane):
        world.pool.shards[first].may_prepare.clear()
        world.pool.kill(second)
        await life.until(lambda: (1, 2) in life.routers[0].offered)
    world.pool.shards[first].may_prepare.set()
    reborn = await world.controller()
    life.plane = life.routers[0].plane = reborn
    await reborn.join_router(router("router-late"), "late", world.values())
    reborn.leave(MemberId("router-late"))
    with running(reborn):
        await life.until(life.is_whole, dt_s=0.05)
    assert life.epoch.number == 3
    assert life.routers[0].used == [1, 3]
    assert (2, 2) not in life.routers[0].offered
    assert "retire 2 in term 2" in world.pool.shards[first].heard


@scenario
async def test_a_reborn_controller_finds_the_shard_that_died_with_its_predecessor(world: World) -> None:
    life = await begin(world)
    with running(life.plane):
        await life.until(lambda: world.now_s > 0.05)
    victim = list(world.pool.shards)[1]
    world.pool.kill(victim)
    reborn = await world.controller()
    life.plane = life.routers[0].plane = reborn
    await reborn.join_router(router("router-late"), "late", world.values())
    reborn.leave(MemberId("router-late"))
    with running(reborn):
        await life.until(life.is_whole, dt_s=0.05)
    assert victim not in world.pool.shards
    assert life.epoch.number == 2


@scenario
async def test_a_reborn_controller_goes_on_with_a_replacement_that_still_loads(world: World) -> None:
    life = await begin(world)
    victim = list(world.pool.shards)[1]
    with running(life.plane):
        world.pool.never_loads = True
        world.pool.kill(victim)
        await life.until(lambda: world.pool.num_created == 3)
    world.pool.never_loads = False
    reborn = await world.controller()
    life.plane = life.routers[0].plane = reborn
    await reborn.join_router(router("router-late"), "late", world.values())
    reborn.leave(MemberId("router-late"))
    with running(reborn):
        await life.until(life.is_whole, dt_s=0.05)
    assert world.pool.num_created == 3


@scenario
async def test_a_router_that_joins_gets_the_epoch_in_force(world: World) -> None:
    life = await begin(world)
    with running(life.plane):
        world.pool.kill(list(world.pool.shards)[1])
        await life.until(life.is_whole)
        welcome = await life.plane.join_router(router("late"), "late", world.values())
        assert welcome["epoch"]["number"] == life.epoch.number == 2


@scenario
async def test_a_router_that_lags_is_offered_the_epoch_in_force_before_the_one_in_preparation(world: World) -> None:
    life = await begin(world, num_routers=2)
    with running(life.plane):
        await life.until(lambda: world.now_s > 3.1)
        sleeper = life.routers.pop()
        sleeper.report()
        await life.plane.scale_shards(3)
        await life.until(lambda: life.epoch.number == 2 and life.is_whole())
        world.pool.shards[next(iter(world.pool.shards))].may_prepare.clear()
        await life.plane.scale_shards(2)
        await life.until(lambda: life.plane.state.preparing is not None)
        offer = life.plane.heartbeat(sleeper.member, sleeper.member_report())["offer"]
        assert (offer["in_force"], offer["preparing"], offer["prepare"]["number"]) == (2, 3, 2)


@scenario
async def test_a_service_that_retires_while_a_shard_is_replaced_leaves_nothing(world: World) -> None:
    life = await begin(world)
    with running(life.plane):
        world.pool.never_loads = True
        world.pool.kill(ShardId(list(world.pool.shards)[1]))
        await life.until(lambda: world.pool.num_created == 3)
        await life.plane.retire()
    assert world.pool.shards == {}
    assert world.store.data is None


async def grow_or_shrink(life: Life, count: int) -> None:
    wanted = await life.plane.scale_shards(count)
    assert len(wanted) == count
    await life.until(lambda: life.is_whole() and set(life.world.pool.shards) == set(wanted))


@scenario
async def test_shards_grow_and_shrink_and_nobody_is_left_over(world: World) -> None:
    life = await begin(world)
    with running(life.plane):
        for count in (3, 5, 2):
            await grow_or_shrink(life, count)
            counts = [len(slots) for slots in life.epoch.placement.slots_by_shard.values()]
            assert max(counts) - min(counts) <= 1
    assert {shard["id"] for shard in life.plane.view()["shards"]} == set(world.pool.shards)


@scenario
async def test_a_shard_that_leaves_serves_until_the_others_have_loaded_what_it_holds(world: World) -> None:
    life = await begin(world)
    first, second = world.pool.shards
    with running(life.plane):
        await life.until(lambda: world.now_s > 0.1)
        world.pool.shards[first].may_prepare.clear()
        assert await life.plane.scale_shards(1) == (first,)
        await life.until(lambda: any(heard.startswith("prepare 2") for heard in world.pool.shards[first].heard))
        assert life.epoch.number == 1
        await life.until(lambda: {s["id"]: s["state"] for s in life.plane.view()["shards"]}[second] == "draining")
        world.pool.shards[first].may_prepare.set()
        await life.until(lambda: life.is_whole() and set(world.pool.shards) == {first})


@scenario
async def test_a_shard_that_dies_while_others_are_added_is_replaced_first(world: World) -> None:
    life = await begin(world)
    first, second = world.pool.shards
    with running(life.plane):
        await life.until(lambda: world.now_s > 0.1)
        world.pool.shards[first].may_prepare.clear()
        await life.plane.scale_shards(3)
        await life.until(lambda: any(heard.startswith("prepare 2") for heard in world.pool.shards[first].heard))
        world.pool.kill(second)
        world.pool.shards[first].may_prepare.set()
        await life.until(lambda: life.is_whole() and len(world.pool.shards) == 3)
    assert second not in world.pool.shards


@scenario
async def test_a_dead_shard_is_the_first_to_leave(world: World) -> None:
    life = await begin(world)
    first, second = world.pool.shards
    with running(life.plane):
        await life.until(lambda: world.now_s > 0.1)
        world.pool.never_loads = True
        world.pool.kill(first)
        await life.until(lambda: len(life.plane.state.shard_ids) == 2 and first not in life.plane.state.shard_ids)
        assert await life.plane.scale_shards(1) == (second,)
        world.pool.never_loads = False
        await life.until(lambda: life.is_whole() and len(world.pool.shards) == 1)


@pytest.mark.parametrize(
    ("count", "reason"), [(0, "between 1, .* not 0"), (-3, "not -3"), (9, "and 8, the slots"), (10**12, "not 1000")]
)
def test_a_number_of_shards_that_cannot_be_is_refused(world: World, count: int, reason: str) -> None:
    async def act() -> None:
        life = await begin(world)
        with pytest.raises(ValueError, match=reason):
            await life.plane.scale_shards(count)
        assert len(life.plane.state.target) == 2

    run(act)


def test_a_service_without_shards_has_nothing_to_scale(world: World) -> None:
    async def act() -> None:
        world.config = world.config.model_copy(update={"shards": 0})
        life = await begin(world)
        with pytest.raises(ValueError, match="this service has none"):
            await life.plane.scale_shards(2)

    run(act)
