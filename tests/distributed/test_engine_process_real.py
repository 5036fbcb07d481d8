"""The engine process with the real engine on a tiny checkpoint: experts inside it, and behind lanes."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from engine_harness import CLOSE_S, READY_S, SECRET, listening, start_message, wait_until, wait_until_async

from cluster.checkpoints.presets import create_checkpoint
from cluster.front.token_listener import TokenListener
from experts.checkpoint import Checkpoint
from experts.epoch import Epoch, ShardAddress
from experts.placement import ShardId, place
from experts.server import ShardServer
from experts.shard import Shard
from experts.weights import load_slots
from router.config import ModelConfig
from router.engine_builder import build_engine
from router.engine_client import EngineClient
from router.messages import FinishReason, GenerateRequest, SequenceOutput, Start
from router.sampling_params import SamplingParams

PROMPTS = [[index * 7 % 200 + 1 for index in range(length)] for length in (3, 17, 40, 61)]
PARAMS = SamplingParams(max_tokens=12, num_logprobs=3, ignore_eos=True, temperature=0.8, seed=11)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_checkpoint("tiny-maverick", tmp_path_factory.mktemp("model") / "tiny-maverick")


@contextmanager
def _running(start: Start) -> Iterator[EngineClient]:
    client = EngineClient()
    try:
        client.start(start, READY_S)
        yield client
    finally:
        client.close(CLOSE_S)


@contextmanager
def _serving_shards(checkpoint: Path, num_shards: int) -> Iterator[Epoch]:
    """Shards of the checkpoint's experts, served by threads of the test, and the epoch that names them."""
    opened = Checkpoint.open(checkpoint)
    config = ModelConfig.from_checkpoint_config(opened.config)
    shard_ids = [ShardId(f"shard-{index}") for index in range(num_shards)]
    placement = place(moe_layers=config.moe_layers, num_experts=config.num_local_experts, shard_ids=shard_ids)
    shards = {
        shard_id: Shard(
            shard_id=shard_id,
            slots=load_slots(opened, slots, config.expert_shape, dtype=torch.float32, device=torch.device("cpu")),
            hidden_size=config.hidden_size,
            dtype=torch.float32,
        )
        for shard_id, slots in placement.slots_by_shard.items()
    }
    servers = {shard_id: ShardServer(shard, secret=SECRET) for shard_id, shard in shards.items()}
    addresses = tuple(
        ShardAddress(shard_id=shard_id, node_id="here", host="127.0.0.1", port=server.port)
        for shard_id, server in servers.items()
    )
    epoch = Epoch(number=1, weights_version=0, shards=addresses, placement=placement)
    for shard_id, server in servers.items():
        shards[shard_id].serve_epoch(epoch)
        server.start()
    try:
        yield epoch
    finally:
        for server in servers.values():
            server.stop()


def _start(checkpoint: Path, epoch: Epoch | None = None, **settings: Any) -> Start:
    start = start_message(str(checkpoint), **settings)
    return Start(
        router_id=start.router_id,
        settings=start.settings,
        secret=SECRET,
        weights_version=0,
        epoch=None if epoch is None else epoch.to_dict(),
    )


async def _generate_all(client: EngineClient) -> list[list[SequenceOutput]]:
    """All prompts at once; the outputs of each."""

    async def one(address: str, index: int) -> list[SequenceOutput]:
        request = GenerateRequest(
            request_id=f"request-{index}",
            prompt_ids=PROMPTS[index],
            params=replace(PARAMS, choice_index=index),
            return_address=address,
        )
        with listener.open(request.request_id, 0) as stream:
            call = asyncio.create_task(client.generate(request))
            outputs = [output async for output in stream]
            assert (await call).finish_reason is FinishReason.LENGTH
        return outputs

    async with listening() as listener:
        return await asyncio.gather(*(one(listener.address, index) for index in range(len(PROMPTS))))


def _flat(outputs: list[SequenceOutput]) -> tuple[list[int], list[float]]:
    tokens = [token for output in outputs for token in output.token_ids]
    return tokens, [entry.logprob for output in outputs for entry in output.logprobs or ()]


def test_shards_and_the_experts_inside_give_the_same_bits_in_whole_steps_and_in_halved_ones(checkpoint: Path) -> None:
    with _running(_start(checkpoint)) as client:
        inside = [_flat(outputs) for outputs in asyncio.run(_generate_all(client))]
    with _serving_shards(checkpoint, 3) as epoch, _running(_start(checkpoint, epoch, max_num_seqs=2)) as client:
        behind_lanes = [_flat(outputs) for outputs in asyncio.run(_generate_all(client))]
    with (
        _serving_shards(checkpoint, 3) as epoch,
        _running(_start(checkpoint, epoch, micro_batches="on")) as client,
    ):
        behind_lanes_halved = [_flat(outputs) for outputs in asyncio.run(_generate_all(client))]
        stats = client.stats()
    assert all(len(tokens) == PARAMS.max_tokens for tokens, _logprobs in inside)
    assert behind_lanes == inside
    assert behind_lanes_halved == inside
    assert stats is None or stats.lost_shards == {}


def test_requests_dropped_at_random_moments_give_every_block_back(checkpoint: Path) -> None:
    async def drop(client: EngineClient, listener: TokenListener, index: int, delay_s: float) -> bool:
        """Whether it was still running."""
        request = GenerateRequest(
            request_id=f"dropped-{index}",
            prompt_ids=PROMPTS[index % len(PROMPTS)],
            params=SamplingParams(max_tokens=60, ignore_eos=True, seed=index),
            return_address=listener.address,
        )
        with listener.open(request.request_id, request.attempt):
            try:
                await asyncio.wait_for(client.generate(request), delay_s)
            except TimeoutError:
                return True
            return False

    async def scenario(client: EngineClient) -> None:
        moments = random.Random(5)
        async with listening() as listener:
            dropped = await asyncio.gather(
                *(drop(client, listener, index, moments.uniform(0, 0.2)) for index in range(40))
            )
            assert sum(dropped) >= 10
            await wait_until_async(lambda: _all_blocks_are_free(client))

    with _running(_start(checkpoint, num_kv_blocks=24)) as client:
        wait_until(lambda: client.stats() is not None)
        asyncio.run(scenario(client))


def _all_blocks_are_free(client: EngineClient) -> bool:
    stats = client.stats()
    return (
        stats is not None
        and stats.num_steps > 0
        and stats.num_running + stats.num_waiting == 0
        and stats.num_free_blocks == stats.num_blocks
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_kv_blocks": 3}, "num_kv_blocks 3 of 16 tokens .* max_model_len is 128"),
        ({"block_size": 5}, "block_size = 5"),
        ({"kv_memory_share": 1e-12}, "max_model_len 128 does not fit"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, not 0"),
    ],
)
def test_settings_that_cannot_work_are_named_at_start(checkpoint: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build_engine(_start(checkpoint, **settings))


def test_a_step_larger_than_shards_take_is_refused_at_start(checkpoint: Path) -> None:
    with (
        _serving_shards(checkpoint, 1) as epoch,
        pytest.raises(ValueError, match=r"max_num_batched_tokens must be at most 65536 .* not 65537"),
    ):
        build_engine(_start(checkpoint, epoch, max_num_batched_tokens=65537))


def test_a_truncated_tensor_is_named_at_start(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for source in checkpoint.iterdir():
        data = source.read_bytes()
        (broken / source.name).write_bytes(data[:-1000] if source.suffix == ".safetensors" else data)
    with pytest.raises(ValueError, match=r"model.*\.safetensors"):
        build_engine(_start(broken))


def test_end_tokens_of_generation_config_json_end_a_sequence(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    greedy = GenerateRequest(
        request_id="r", prompt_ids=PROMPTS[0], params=SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    )
    expected = _token_ids(folder, greedy)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [expected[3]]}))
    ended = _token_ids(folder, msgspec.structs.replace(greedy, params=replace(greedy.params, ignore_eos=False)))
    assert ended == expected[: expected.index(expected[3]) + 1]


def _token_ids(folder: Path, request: GenerateRequest) -> list[int]:
    engine = build_engine(_start(folder)).engine
    engine.add(request)
    token_ids: list[int] = []
    while engine.has_work:
        token_ids += [token_id for output in engine.step() for token_id in output.token_ids]
    return token_ids
