"""A world of plain objects for the control plane: shards, Serve, Ray's memory and a clock that tests turn."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from cluster.balance.expert_traffic import SlotTraffic
from cluster.config import ServiceConfig
from cluster.control.control_plane import ControlPlane
from cluster.control.desired_state import DesiredState, decode_state, encode_state
from cluster.control.membership import Member, MemberId, MemberKind, MemberState
from cluster.control.outside import Outside
from cluster.control.shard_fleet import ShardDied, ShardRefused, ShardReport
from cluster.control.shard_work import ShardWork
from experts.epoch import Epoch, ShardAddress
from experts.placement import ShardId, Slot
from experts.shard_spec import ShardSpec
from experts.shard_speed import ShardSpeed

MODEL = {
    "model_type": "llama4_text",
    "num_hidden_layers": 4,
    "interleave_moe_layer_step": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}
ME = Member(member_id=MemberId("controller-1"), kind=MemberKind.CONTROLLER, pid=1, node_id="n", state=MemberState.READY)


class FakeStore:
    """Keeps bytes, as the real one does."""

    def __init__(self) -> None:
        self.data: bytes | None = None

    async def load(self) -> DesiredState | None:
        return None if self.data is None else decode_state(self.data)

    async def save(self, state: DesiredState) -> None:
        self.data = encode_state(state)

    async def delete(self) -> None:
        self.data = None


@dataclass
class FakeShard:
    """is_silent: a frozen process. may_prepare: cleared, it takes its time. error: what it says to prepare. num_loaded:
    how far it says that it is."""

    spec: ShardSpec
    epochs: list[int] = field(default_factory=list)
    load: list[tuple[int, int, int]] = field(default_factory=list)
    slots: set[Slot] = field(default_factory=set)
    is_silent: bool = False
    may_prepare: asyncio.Event = field(default_factory=asyncio.Event)
    error: str | None = None
    num_loaded: int = 0
    busy_s: float = 0.0
    node_id: str = "n"
    is_leaving: bool = False
    heard: list[str] = field(default_factory=list)
    versions: dict[int, int] = field(default_factory=dict)
    models: dict[int, str] = field(default_factory=dict)


class FakePool:
    def __init__(self) -> None:
        self.shards: dict[ShardId, FakeShard] = {}
        self.num_created = 0
        self.num_free_slots = 0
        self.num_free_bytes = 1 << 40
        self.loading_error: str | None = None
        self.never_loads = False
        self.drained: list[ShardId] = []

    async def living(self, shard_ids: Collection[ShardId]) -> set[ShardId]:
        return set(shard_ids) & set(self.shards)

    async def create(self, spec: ShardSpec) -> None:
        if spec.shard_id in self.shards:
            return
        self.num_created += 1
        self.shards[spec.shard_id] = FakeShard(spec, slots=set(spec.slots))
        self.shards[spec.shard_id].may_prepare.set()

    async def address(self, shard_id: ShardId) -> ShardAddress:
        if self.loading_error is not None and shard_id.startswith("shard-1"):
            raise ShardDied(self.loading_error)
        while self.never_loads:
            await asyncio.sleep(0.001)
            self._get(shard_id)
        return ShardAddress(shard_id=shard_id, node_id="n", host="h", port=1)

    async def prepare(self, shard_id: ShardId, term: int, epoch: Epoch, model: str) -> None:
        shard = await self._spoken_to(shard_id)
        shard.heard.append(f"prepare {epoch.number} in term {term}")
        await shard.may_prepare.wait()
        if shard.error is not None:
            raise ShardRefused(shard.error)
        self._get(shard_id)
        shard.versions[epoch.number] = epoch.weights_version
        alike = [each for each in shard.epochs if shard.versions[each] == epoch.weights_version]
        assert len({*alike, epoch.number}) <= 2, "a shard serves two epochs of a version at most"
        shard.models[epoch.weights_version] = model
        shard.slots |= set(epoch.placement.slots_by_shard[shard_id])
        shard.epochs = sorted({*shard.epochs, epoch.number})

    async def retire(self, shard_id: ShardId, term: int, number: int) -> None:
        shard = await self._spoken_to(shard_id)
        shard.heard.append(f"retire {number} in term {term}")
        shard.epochs = [epoch for epoch in shard.epochs if epoch != number]

    async def report(self, shard_id: ShardId) -> ShardReport:
        shard = await self._spoken_to(shard_id)
        return ShardReport(
            pid=7,
            node_id=shard.node_id,
            is_leaving=shard.is_leaving,
            load=shard.load,
            epochs={number: shard.versions[number] for number in shard.epochs},
            num_free_bytes=self.num_free_bytes,
            memory_pool="n",
            num_free_slots=self.num_free_slots,
            num_loaded=shard.num_loaded,
            work=ShardWork(
                by_slot={Slot(layer, expert): SlotTraffic(rows, rows // 200) for layer, expert, rows in shard.load},
                busy_s=shard.busy_s,
                speed=ShardSpeed(bytes_per_s=1e9, flops_per_s=1e10),
            ),
        )

    async def remove(self, shard_id: ShardId, *, drain_timeout_s: float) -> None:
        if drain_timeout_s > 0:
            self.drained.append(shard_id)
        self.shards.pop(shard_id, None)

    def kill(self, shard_id: ShardId) -> None:
        del self.shards[shard_id]

    async def _spoken_to(self, shard_id: ShardId) -> FakeShard:
        """A frozen process answers when it wakes."""
        while self._get(shard_id).is_silent:
            await asyncio.sleep(0.001)
        return self._get(shard_id)

    def _get(self, shard_id: ShardId) -> FakeShard:
        if shard_id not in self.shards:
            raise ShardDied("killed")
        return self.shards[shard_id]


class FakeApps:
    def __init__(self) -> None:
        self.present: bool | None = True

    async def is_present(self, app_name: str) -> bool | None:
        return self.present


class FakeProbe:
    def __init__(self) -> None:
        self.dead: set[str] = set()

    async def has_died(self, process: Any) -> bool:
        return process in self.dead


class FakeNodes:
    def __init__(self) -> None:
        self.leaving: frozenset[str] | None = frozenset()
        self.num_asked = 0
        self.has_others = True

    async def draining(self) -> frozenset[str] | None:
        self.num_asked += 1
        return self.leaving

    async def are_there_others(self, node_ids: frozenset[str]) -> bool:
        return self.has_others


@dataclass
class World:
    config: ServiceConfig
    store: FakeStore = field(default_factory=FakeStore)
    pool: FakePool = field(default_factory=FakePool)
    apps: FakeApps = field(default_factory=FakeApps)
    probe: FakeProbe = field(default_factory=FakeProbe)
    nodes: FakeNodes = field(default_factory=FakeNodes)
    now_s: float = 0.0

    async def controller(self) -> ControlPlane:
        outside = Outside(
            store=self.store,
            apps=self.apps,
            pool=self.pool,
            probe=self.probe,
            nodes=self.nodes,
            clock=lambda: self.now_s,
        )
        return await ControlPlane.start(config=self.config, me=ME, num_cores=2, outside=outside)

    def values(self, **changes: Any) -> dict[str, Any]:
        return {**self.config.model_dump(), **changes}


def router(name: str = "router-1", state: MemberState = MemberState.READY) -> Member:
    return Member(member_id=MemberId(name), kind=MemberKind.ROUTER, pid=11, node_id="n", state=state)


def run(act: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await act()

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)
