"""An update of the weights in a plain world: both versions are kept whole, and it ends well or leaves all as it was."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_life import FakeRouter, Life, begin, running
from fake_world import MODEL, World, router, run

from cluster.config import ServiceConfig
from cluster.control.member_report import MemberReport
from cluster.control.membership import MemberKind
from cluster.control.update_plan import UpdateState
from cluster.control.updating import UpdateRefusedError

GATEWAY = replace(router("gateway-1"), kind=MemberKind.GATEWAY)


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(MODEL))
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    return World(ServiceConfig(model=str(tmp_path / "old"), shards=2, heartbeat_s=0.01))


@pytest.fixture(autouse=True)
def _time_runs_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.control.control_plane.SUSPECT_AFTER_HEARTBEATS", 400)


def scenario(act: Callable[[World], Awaitable[None]]) -> Callable[[World], None]:
    def test(world: World) -> None:
        run(lambda: act(world))

    test.__name__ = act.__name__
    return test


class Update:
    """A life with one gateway, the routers of which follow what they are told of versions, as replicas do."""

    def __init__(self, world: World, life: Life) -> None:
        self.world, self.life = world, life
        self.new_model = str(Path(world.config.model).parent / "new")
        self.open_versions: set[int] = set()
        self.gateway_version = 1
        self.failed: dict[int, str] = {}
        self.may_start = True
        life.plane.join_gateway(GATEWAY, "gateway")

    @property
    def state(self) -> str:
        progress = self.life.plane.updating.progress("")
        assert progress is not None
        return str(progress["state"])

    def told(self) -> tuple[int, list[int]]:
        told = self.life.plane.updating.versions_told()
        return told["served"], told["wanted"]

    def versions(self) -> list[int]:
        return sorted(each.weights_version for each in self.life.routers)

    async def begin(self) -> None:
        await self.life.plane.updating.begin(self.new_model, dry_run=False)

    async def until(self, condition: Callable[[], bool]) -> None:
        async def once() -> None:
            await self._follow_versions()
            self._report_gateway()

        while not condition():
            await once()
            for each in self.life.routers:
                self._report(each)
            self.world.now_s += 0.02
            await asyncio.sleep(0.002)

    def _report(self, each: FakeRouter) -> None:
        report = replace(each.member_report(), failed_versions=self.failed)
        answer = self.life.plane.heartbeat(each.member, report)
        if not answer["known"]:
            self.life.plane.take_in(each.member, each.member.member_id, report)
        if "offer" in answer:
            each.follow(answer["offer"])

    def _report_gateway(self) -> None:
        report = MemberReport(weights_versions=frozenset({self.gateway_version, *self.open_versions}))
        answer = self.life.plane.heartbeat(GATEWAY, report)
        if not answer["known"]:
            self.life.plane.take_in(GATEWAY, "gateway", report)
        self.gateway_version = answer["weights"]["served"]

    async def _follow_versions(self) -> None:
        wanted = self.life.plane.updating.versions_told()["wanted"]
        for replica in {each.replica for each in self.life.routers}:
            mine = {each.weights_version: each for each in self.life.routers if each.replica == replica}
            for version in set(wanted) - mine.keys() - self.failed.keys():
                if self.may_start:
                    self.life.routers.append(await self._join(f"{replica}-v{version}", replica, version))
            for version in mine.keys() - set(wanted):
                self.life.routers.remove(mine[version])
                self.life.plane.leave(mine[version].member.member_id)

    async def _join(self, name: str, replica: str, version: int) -> FakeRouter:
        welcome = await self.life.plane.join_router(router(name), name, self.world.values(), version)
        assert welcome["weights_version"] == welcome["epoch"]["weights_version"] == version
        made = FakeRouter(self.life.plane, name, weights_version=version)
        made.replica, made.epoch = replica, welcome["epoch"]["number"]
        return made

    def models_in_shards(self) -> list[set[int]]:
        """The versions whose epochs each shard serves."""
        return [{shard.versions[number] for number in shard.epochs} for shard in self.world.pool.shards.values()]


async def started(world: World, num_routers: int = 2) -> Update:
    return Update(world, await begin(world, num_routers))


async def rest(update: Update) -> None:
    """Until the first looks have been taken."""
    await update.until(lambda: update.world.now_s > 4)


@scenario
async def test_new_requests_get_the_new_version_once_it_is_everywhere_and_the_old_one_goes_with_its_last(
    world: World,
) -> None:
    update = await started(world)
    with running(update.life.plane):
        await rest(update)
        update.open_versions, update.may_start = {1}, False
        await update.begin()
        await update.until(lambda: update.state == "starting_routers")
        assert update.told() == (1, [1, 2])
        assert update.models_in_shards() == [{1, 2}] * 2
        update.may_start = True
        await update.until(lambda: update.state == "draining")
        assert update.versions() == [1, 1, 2, 2]
        assert update.told() == (2, [1, 2])
        for _ in range(50):
            await update.until(lambda: True)
            update.world.now_s += 0.1
            await asyncio.sleep(0.002)
        assert update.state == "draining", "a request of the old version is open"
        update.open_versions = set()
        await update.until(lambda: update.state == "done" and update.models_in_shards() == [{2}] * 2)
    assert update.versions() == [2, 2]
    assert {shard.models[2] for shard in world.pool.shards.values()} == {update.new_model}
    assert update.life.plane.view()["model"] == update.new_model


@scenario
async def test_a_shard_that_is_lost_while_both_versions_serve_is_made_good_for_both(world: World) -> None:
    update = await started(world)
    victim = next(iter(world.pool.shards))
    with running(update.life.plane):
        await rest(update)
        update.open_versions = {1}
        await update.begin()
        await update.until(lambda: update.state == "draining")
        world.pool.kill(victim)
        await update.until(
            lambda: (
                len(world.pool.shards) == 2
                and victim not in world.pool.shards
                and update.models_in_shards() == [{1, 2}] * 2
                and len({each.epoch for each in update.life.routers}) == 2
                and all(each.epoch > 2 for each in update.life.routers)
            )
        )
        assert update.state == "draining"
        update.open_versions = set()
        await update.until(lambda: update.state == "done" and update.models_in_shards() == [{2}] * 2)
        await update.until(lambda: set(update.life.plane.state.shard_ids) == set(world.pool.shards))


@scenario
async def test_a_shard_that_is_lost_while_the_new_version_loads_delays_the_update(world: World) -> None:
    update = await started(world)
    victim, other = world.pool.shards
    with running(update.life.plane):
        await rest(update)
        world.pool.shards[other].may_prepare.clear()
        await update.begin()
        await update.until(lambda: update.life.plane.state.other.preparing is not None)
        held_back = world.pool.shards[other]
        world.pool.num_free_slots, world.pool.never_loads = 100, True
        world.pool.kill(victim)
        await update.until(lambda: update.life.plane.state.other.preparing is None)
        held_back.may_prepare.set()
        await update.until(lambda: set(update.life.epoch.placement.slots_by_shard) == {other})
        emergency_s = world.now_s
        await update.until(lambda: world.now_s > emergency_s + 3)
        assert update.life.plane.state.other.preparing is None, "first everybody must be there"
        assert update.state == "loading"
        world.pool.never_loads = False
        await update.until(lambda: update.state == "done" and update.models_in_shards() == [{2}] * 2)
    assert victim not in world.pool.shards


@scenario
async def test_what_shards_cannot_load_is_given_up_and_changes_nothing(world: World) -> None:
    update = await started(world)
    with running(update.life.plane):
        await rest(update)
        next(iter(world.pool.shards.values())).error = "no such tensor"
        await update.begin()
        await update.until(lambda: update.state == "given_up" and update.models_in_shards() == [{1}] * 2)
        progress = update.life.plane.updating.progress("")
        assert "no such tensor" in progress["reason"]
        assert update.life.plane.state.weights_version == 1
        next(iter(world.pool.shards.values())).error = None
        await update.begin()
        await update.until(lambda: update.state == "done")
    assert update.life.plane.state.weights_version == 3, "a number is never used again"


@scenario
async def test_what_a_router_cannot_start_is_given_up_and_the_others_go_back(world: World) -> None:
    update = await started(world)
    with running(update.life.plane):
        await rest(update)
        await update.begin()
        await update.until(lambda: update.state == "starting_routers")
        update.failed = {2: "no memory"}
        await update.until(lambda: update.state == "given_up" and update.models_in_shards() == [{1}] * 2)
        assert "no memory" in update.life.plane.updating.progress("")["reason"]
    assert update.versions() == [1, 1]


@pytest.mark.parametrize("state", [UpdateState.LOADING, UpdateState.STARTING_ROUTERS, UpdateState.DRAINING])
def test_a_reborn_controller_goes_on_with_an_update(world: World, state: UpdateState) -> None:
    async def act() -> None:
        update = await started(world)
        with running(update.life.plane):
            await rest(update)
            update.open_versions, update.may_start = {1}, state is not UpdateState.STARTING_ROUTERS
            first = next(iter(world.pool.shards.values()))
            if state is UpdateState.LOADING:
                first.may_prepare.clear()
            await update.begin()
            is_loading = state is UpdateState.LOADING
            await update.until(lambda: not is_loading or "prepare 2 in term 1" in first.heard)
            await update.until(lambda: update.state == state)
        reborn = await world.controller()
        update.life.plane = reborn
        for each in update.life.routers:
            each.plane = reborn
        first.may_prepare.set()
        with running(reborn):
            await reborn.join_router(router("late"), "late", world.values())
            reborn.leave(router("late").member_id)
            update.may_start = True
            await update.until(lambda: update.state == "draining")
            await update.until(lambda: world.now_s > 20)
            assert update.state == "draining", "it must hear of the gateway's requests before the old version goes"
            update.open_versions = set()
            await update.until(lambda: update.state == "done" and update.models_in_shards() == [{2}] * 2)
        assert reborn.state.model == update.new_model

    run(act)


@scenario
async def test_after_an_update_replacements_and_routers_get_the_new_weights(world: World) -> None:
    update = await started(world)
    with running(update.life.plane):
        await rest(update)
        await update.begin()
        await update.until(lambda: update.state == "done")
        world.pool.kill(next(iter(world.pool.shards)))
        await update.until(lambda: len(world.pool.shards) == 2 and update.models_in_shards() == [{2}] * 2)
        assert [shard.spec.model for shard in world.pool.shards.values()][-1] == update.new_model
        assert [shard.spec.weights_version for shard in world.pool.shards.values()][-1] == 2
        welcome = await update.life.plane.join_router(router("late"), "late", world.values())
    assert (welcome["config"]["model"], welcome["weights_version"]) == (update.new_model, 2)
    assert welcome["epoch"]["weights_version"] == 2


def told_of(update: Update) -> dict[str, Any]:
    return {"state": update.life.plane.state.update, "shards": update.models_in_shards()}


@scenario
async def test_an_update_is_refused_where_it_cannot_begin(world: World) -> None:
    update = await started(world)
    begin_update = update.life.plane.updating.begin
    with running(update.life.plane):
        await rest(update)
        before = told_of(update)
        with pytest.raises(UpdateRefusedError, match=r"the service has the weights of .*old already"):
            await begin_update(world.config.model, dry_run=False)
        with pytest.raises(ValueError, match=r"model /nowhere: no such folder"):
            await begin_update("/nowhere", dry_run=False)
        config = Path(update.new_model) / "config.json"
        config.write_text(json.dumps({**MODEL, "num_local_experts": 8}))
        with pytest.raises(ValueError, match="num_local_experts is 8, the service has 4"):
            await begin_update(update.new_model, dry_run=False)
        config.write_text(json.dumps(MODEL))
        world.pool.num_free_bytes = 10
        await update.until(lambda: update.world.now_s > 6)
        lacking_on = r"bytes are missing on n: shard-0-.*, shard-1-.*, router-0"
        with pytest.raises(UpdateRefusedError, match=lacking_on) as lacking:
            await begin_update(update.new_model, dry_run=True)
        [room] = lacking.value.rooms
        assert room.missing_bytes == room.needed_bytes - 9
        assert told_of(update) == before
        world.pool.num_free_bytes = 1 << 40
        await update.until(lambda: update.world.now_s > 8)
        assert (await begin_update(update.new_model, dry_run=True))["update_id"] == ""
        assert told_of(update) == before
        update.may_start = False
        await update.begin()
        with pytest.raises(UpdateRefusedError, match="is under way, to "):
            await update.begin()
