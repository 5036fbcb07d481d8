"""Shards come, go, stall and die under a real engine process with open streams, and the epoch changes. No Ray: the
test does what the controller would do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from checkpoint_shard import CheckpointShard
from engine_harness import CLOSE_S, READY_S, SECRET, listening, start_message, wait_until, wait_until_async

from cluster.checkpoints.presets import create_checkpoint
from cluster.front.token_listener import TokenListener
from experts.checkpoint import Checkpoint
from experts.epoch import Epoch
from experts.lane import LaneDispatcher
from experts.placement import ExpertPlacement, ShardId, Slot, place
from router.config import ModelConfig
from router.engine_client import EngineClient
from router.messages import AbandonEpoch, AdoptEpoch, ErrorCode, FinishReason, GenerateRequest, PrepareEpoch, Start
from router.sampling_params import SamplingParams

PROMPTS = [[(7 * index + length) % 200 + 1 for index in range(length)] for length in (3, 9, 17, 23, 34, 40, 52, 61)]
# Long enough that nobody has finished when the fault comes: they have a hundred tokens to go.
MAX_TOKENS = 120
WARM_TOKENS = 8
FIRST, VICTIM, NEW = ShardId("shard-0"), ShardId("shard-1"), ShardId("shard-1-new")


@dataclass(slots=True)
class Stream:
    token_ids: list[int] = field(default_factory=list)
    end: FinishReason | None = None
    error: str | None = None
    error_code: ErrorCode | None = None


async def generate(
    client: EngineClient, fault: Callable[[list[Stream]], Awaitable[None]] | None = None
) -> list[Stream]:
    """All prompts at once; fault comes when each stream has a few tokens and none has ended."""
    async with listening() as listener:
        streams = [Stream() for _ in PROMPTS]
        tasks = [asyncio.create_task(_read(client, listener, *each)) for each in enumerate(streams)]
        if fault is not None:
            await wait_until_async(lambda: all(len(stream.token_ids) >= WARM_TOKENS for stream in streams))
            assert not any(stream.end for stream in streams)
            await fault(streams)
        await asyncio.wait_for(asyncio.gather(*tasks), 120)
    return streams


async def _read(client: EngineClient, listener: TokenListener, index: int, stream: Stream) -> None:
    request = GenerateRequest(
        request_id=f"request-{index}",
        prompt_ids=PROMPTS[index],
        params=SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, temperature=0.8, seed=11, choice_index=index),
        return_address=listener.address,
    )
    with listener.open(request.request_id, 0) as tokens:
        call = asyncio.create_task(client.generate(request))
        async for output in tokens:
            stream.token_ids += output.token_ids
            stream.end, stream.error, stream.error_code = output.finish_reason, output.error, output.error_code
        await call


def start_of(model: Path, epoch: Epoch | None, **settings: Any) -> Start:
    start = start_message(str(model), **settings)
    sizes = msgspec.structs.replace(start.settings, max_model_len=256, num_kv_blocks=256)
    return msgspec.structs.replace(start, epoch=None if epoch is None else epoch.to_dict(), settings=sizes)


class Scene:
    """A checkpoint, shard processes, one engine process, and streams on it."""

    def __init__(self, model: Path, *, copies: int, **settings: Any) -> None:
        self.model = model
        self.config = ModelConfig.from_checkpoint_config(Checkpoint.open(model).config)
        self.shards: dict[ShardId, CheckpointShard] = {}
        placement = self.place([FIRST, VICTIM], copies=copies)
        for shard_id in placement.slots_by_shard:
            self.add_shard(shard_id, placement.slots_by_shard[shard_id])
        self.epoch = self.make_epoch(1, placement)
        for shard in self.shards.values():
            shard.prepare(self.epoch)
        self.client = EngineClient()
        self.client.start(start_of(model, self.epoch, **settings), READY_S)

    def place(self, shard_ids: Sequence[ShardId], *, copies: int = 1) -> ExpertPlacement:
        return place(
            moe_layers=self.config.moe_layers,
            num_experts=self.config.num_local_experts,
            shard_ids=shard_ids,
            copies=copies,
        )

    def add_shard(self, shard_id: ShardId, slots: tuple[Slot, ...]) -> CheckpointShard:
        self.shards[shard_id] = CheckpointShard(
            shard_id, model=self.model, shape=self.config.expert_shape, slots=slots, secret=SECRET
        )
        return self.shards[shard_id]

    def make_epoch(self, number: int, placement: ExpertPlacement) -> Epoch:
        addresses = tuple(self.shards[shard_id].address for shard_id in placement.slots_by_shard)
        return Epoch(number=number, weights_version=0, shards=addresses, placement=placement)

    def replaced(self) -> ExpertPlacement:
        """The first placement with NEW in VICTIM's place."""
        slots = self.epoch.placement.slots_by_shard
        return ExpertPlacement(slots_by_shard={FIRST: slots[FIRST], NEW: slots[VICTIM]})

    async def adopt(self, epoch: Epoch) -> None:
        """Prepare, commit, and see the engine in it."""
        await self.prepare(epoch)
        self.client.guide(AdoptEpoch(number=epoch.number))
        await wait_until_async(lambda: self.client.lanes.epoch == epoch.number)

    async def prepare(self, epoch: Epoch) -> None:
        self.client.guide(PrepareEpoch(epoch=epoch.to_dict()))
        await wait_until_async(lambda: self.client.lanes.prepared == epoch.number)

    @property
    def num_parked(self) -> int:
        stats = self.client.stats()
        return 0 if stats is None else stats.num_parked

    def close(self) -> None:
        self.client.close(CLOSE_S)
        for shard in self.shards.values():
            shard.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_checkpoint("tiny-maverick", tmp_path_factory.mktemp("model") / "tiny-maverick")


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> list[Stream]:
    """With the experts in the router's own process, where no shard can be lost."""
    client = EngineClient()
    try:
        client.start(start_of(model, None), READY_S)
        streams = asyncio.run(generate(client))
    finally:
        client.close(CLOSE_S)
    assert [stream.end for stream in streams] == [FinishReason.LENGTH] * len(PROMPTS)
    return streams


@pytest.fixture
def make_scene(model: Path) -> Iterator[Callable[..., Scene]]:
    made: list[Scene] = []

    def make(*, copies: int = 1, **settings: Any) -> Scene:
        made.append(Scene(model, copies=copies, **settings))
        return made[-1]

    yield make
    for scene in made:
        scene.close()


def run(scenario: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(200):
            await scenario

    asyncio.run(bounded())


def test_a_shard_without_a_copy_is_replaced_and_no_token_changes(
    make_scene: Callable[..., Scene], undisturbed: list[Stream]
) -> None:
    scene = make_scene()

    async def replace_victim(streams: list[Stream]) -> None:
        scene.shards[VICTIM].kill()
        await wait_until_async(lambda: scene.num_parked == len(PROMPTS))
        assert "phase" in scene.client.lanes.lost[VICTIM]
        assert not any(stream.end for stream in streams)
        placement = scene.replaced()
        new = scene.add_shard(NEW, placement.slots_by_shard[NEW])
        epoch = scene.make_epoch(2, placement)
        new.prepare(epoch)
        scene.shards[FIRST].prepare(epoch)
        await scene.adopt(epoch)
        scene.shards[FIRST].retire(1)

    async def scenario() -> None:
        disturbed = await generate(scene.client, replace_victim)
        assert disturbed == undisturbed
        assert scene.client.lanes.lost == {}

    run(scenario())
    assert scene.shards[NEW].stats()["num_rows"] > 0
    first = scene.shards[FIRST].stats()
    assert (first["epochs"], first["num_lanes"]) == ([2], 1), "the link to a shard of both epochs is kept"
    assert first["num_refused_requests"] == 0


def test_survivors_load_the_lost_slots_while_they_serve(
    make_scene: Callable[..., Scene], undisturbed: list[Stream]
) -> None:
    scene = make_scene()

    async def hand_over(_streams: list[Stream]) -> None:
        scene.shards[VICTIM].kill()
        await wait_until_async(lambda: scene.num_parked == len(PROMPTS))
        epoch = scene.make_epoch(2, scene.place([FIRST]))
        scene.shards[FIRST].prepare(epoch)
        await scene.adopt(epoch)

    async def scenario() -> None:
        num_slots = len(scene.shards[FIRST].stats()["slots"])
        assert await generate(scene.client, hand_over) == undisturbed
        assert len(scene.shards[FIRST].stats()["slots"]) == 2 * num_slots

    run(scenario())


def test_a_new_shard_joins_and_an_old_one_leaves_under_streams_that_do_not_notice(
    make_scene: Callable[..., Scene], undisturbed: list[Stream]
) -> None:
    scene = make_scene()
    placement = scene.replaced()
    new = scene.add_shard(NEW, placement.slots_by_shard[NEW])

    async def move(streams: list[Stream]) -> None:
        epoch = scene.make_epoch(2, placement)
        for shard_id in (FIRST, NEW):
            scene.shards[shard_id].prepare(epoch)
        await scene.adopt(epoch)
        for shard_id in (FIRST, VICTIM):
            scene.shards[shard_id].retire(1)
        before = new.stats()["num_rows"]
        await wait_until_async(lambda: new.stats()["num_rows"] > before)
        assert not any(stream.end for stream in streams)
        assert scene.shards[VICTIM].stats()["num_lanes"] == 0
        scene.shards[VICTIM].kill()

    async def scenario() -> None:
        assert await generate(scene.client, move) == undisturbed
        assert scene.client.lanes.lost == {}

    run(scenario())


def test_a_shard_that_stalled_comes_back_as_a_new_incarnation_of_its_link(
    make_scene: Callable[..., Scene], undisturbed: list[Stream]
) -> None:
    scene = make_scene(copies=2, lane_timeout_s=0.5)

    async def stall(streams: list[Stream]) -> None:
        victim = scene.shards[VICTIM]
        victim.stop()
        await wait_until_async(lambda: VICTIM in scene.client.lanes.lost)
        counts = [len(stream.token_ids) for stream in streams]
        await wait_until_async(lambda: [len(stream.token_ids) for stream in streams] > counts)
        victim.wake()
        epoch = replace(scene.epoch, number=2)
        for shard in scene.shards.values():
            shard.prepare(epoch)
        await scene.adopt(epoch)
        assert not any(stream.end for stream in streams)
        assert scene.client.lanes.lost == {}
        for shard in scene.shards.values():
            shard.retire(1)
        before = victim.stats()["num_rows"]
        await wait_until_async(lambda: victim.stats()["num_rows"] > before)

    async def scenario() -> None:
        assert await generate(scene.client, stall) == undisturbed

    run(scenario())


def test_after_the_wait_requests_end_and_name_shard_and_layer(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(expert_wait_s=1.0)

    async def kill(_streams: list[Stream]) -> None:
        scene.shards[VICTIM].kill()

    async def scenario() -> None:
        for stream in await generate(scene.client, kill):
            assert (stream.end, stream.error_code) == (FinishReason.ERROR, ErrorCode.UNAVAILABLE)
            assert stream.error is not None
            assert "could not be reached for 1 s: shard shard-1 (127.0.0.1:" in stream.error
            assert "layer" in stream.error
        await wait_until_async(lambda: scene.num_parked == 0)

    run(scenario())


def test_an_aborted_preparation_leaves_no_link_and_the_streams_in_peace(
    make_scene: Callable[..., Scene], undisturbed: list[Stream]
) -> None:
    scene = make_scene()
    placement = scene.replaced()
    new = scene.add_shard(NEW, placement.slots_by_shard[NEW])

    async def prepare_in_vain(streams: list[Stream]) -> None:
        epoch = scene.make_epoch(2, placement)
        for shard_id in (FIRST, NEW):
            scene.shards[shard_id].prepare(epoch)
        await scene.prepare(epoch)
        assert new.stats()["num_lanes"] == 1
        scene.client.guide(AbandonEpoch(number=2))
        for shard_id in (FIRST, NEW):
            scene.shards[shard_id].retire(2)
        await wait_until_async(lambda: new.stats()["num_lanes"] == 0)
        scene.client.guide(AdoptEpoch(number=2))
        assert not any(stream.end for stream in streams)
        assert scene.client.lanes.epoch == 1

    async def scenario() -> None:
        assert await generate(scene.client, prepare_in_vain) == undisturbed
        assert scene.client.lanes.epoch == 1
        assert scene.shards[NEW].stats()["num_rows"] == 0

    run(scenario())


def test_a_shard_that_cannot_be_reached_is_told_when_the_epoch_is_prepared(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()

    async def scenario() -> None:
        placement = scene.replaced()
        new = scene.add_shard(NEW, placement.slots_by_shard[NEW])
        epoch = scene.make_epoch(2, placement)
        new.kill()
        await scene.prepare(epoch)
        assert list(scene.client.lanes.unreachable) == [NEW]
        assert "phase connect" in scene.client.lanes.unreachable[NEW]

    run(scenario())


def test_a_router_in_a_retired_epoch_is_refused_until_it_adopts_the_next(make_scene: Callable[..., Scene]) -> None:
    """What a router meets that slept longer than its lease."""
    scene = make_scene()
    torch.set_num_threads(1)
    epoch = replace(scene.epoch, number=2)
    for shard in scene.shards.values():
        shard.prepare(epoch)
    lane = LaneDispatcher(lane_id="sleeper", epoch=scene.epoch, secret=SECRET, timeout_s=10)
    for shard in scene.shards.values():
        shard.retire(1)
    layer = scene.config.moe_layers[0]
    x_TD = torch.randn(30, scene.config.hidden_size)
    scores_TK, ids_TK = torch.randn(30, scene.config.num_local_experts).topk(1, dim=1)

    def missing(step: int) -> torch.Tensor | None:
        lane.begin_step(step)
        return lane.combine(lane.dispatch(layer, x_TD, ids_TK, torch.sigmoid(scores_TK))).missing_T

    refused = missing(1)
    assert refused is not None
    assert refused.all()
    assert all("refused epoch 1: STALE_EPOCH" in reason for reason in lane.lost.values())
    assert sum(shard.stats()["num_refused_requests"] for shard in scene.shards.values()) == 2
    lane.adopt(epoch, {shard_id: lane.connect(epoch.address_of(shard_id)) for shard_id in lane.lacks(epoch)}, {})
    assert missing(2) is None
    lane.close()


def test_an_open_handle_ends_with_its_epoch(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    torch.set_num_threads(1)
    epoch = replace(scene.epoch, number=2)
    for shard in scene.shards.values():
        shard.prepare(epoch)
    lane = LaneDispatcher(lane_id="lane", epoch=scene.epoch, secret=SECRET, timeout_s=10)
    lane.begin_step(1)
    x_TD = torch.randn(5, scene.config.hidden_size)
    handle = lane.dispatch(scene.config.moe_layers[0], x_TD, torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1))
    lane.adopt(epoch, {}, {})
    with pytest.raises(ValueError, match="step 1 has begun"):
        lane.combine(handle)
    lane.close()
    wait_until(lambda: all(shard.stats()["num_lanes"] <= 1 for shard in scene.shards.values()))
