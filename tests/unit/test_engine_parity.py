"""The engine over the real model: transformers' greedy tokens, and bits that depend on no other request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny_models import MAVERICK, SCOUT, TinyModel, make_tiny, prompt

from experts.dispatch import LocalDispatcher
from experts.placement import ShardId
from experts.shard import Shard
from router.engine import Engine, EngineLimits
from router.kv_cache import KvCache, KvCacheSpec
from router.messages import EngineStats, GenerateRequest, MicroBatchMode, TokenLogprobs
from router.micro_batches import MicroBatching
from router.model import Llama4Model
from router.sampling_params import SamplingParams

NUM_TOKENS = 64
MAX_MODEL_LEN = 176
SMALLEST_MARGIN = 1e-3

SHARED = prompt(37, seed=1000)
PROMPTS = [
    *(prompt(length, seed=length) for length in (1, 2, 15, 16, 17, 31, 48, 53, 90)),
    *([*SHARED, *prompt(length, seed=2000 + length)] for length in (1, 5, 11, 12, 26, 40, 52)),
]
AMPLE = {"num_global_blocks": 700, "num_local_blocks": 700, "max_num_batched_tokens": 128}
SETTINGS: dict[str, dict[str, int]] = {
    "ample": AMPLE,
    "small budget": AMPLE | {"max_num_batched_tokens": 7},
    "few blocks": {"num_global_blocks": 100, "num_local_blocks": 40, "max_num_batched_tokens": 50},
    "few blocks of size 1": {
        "num_global_blocks": 400,
        "num_local_blocks": 90,
        "max_num_batched_tokens": 50,
        "block_size": 1,
    },
    "whole chunks as blocks": {
        "num_global_blocks": 30,
        "num_local_blocks": 30,
        "max_num_batched_tokens": 50,
        "block_size": 16,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """A model that engines are put around, and what transformers makes of PROMPTS."""

    tiny: TinyModel
    model: Llama4Model
    shard: Shard
    expected: list[list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Produced:
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs | None] | None


@pytest.fixture(scope="module", params=["scout", "maverick"])
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    torch.set_num_threads(1)
    config = {"scout": SCOUT, "maverick": MAVERICK}[request.param]
    tiny = make_tiny(config, tmp_path_factory.mktemp(request.param))
    shard = Shard(
        shard_id=ShardId("local"),
        slots=tiny.experts(),
        hidden_size=tiny.config.hidden_size,
        dtype=torch.float32,
    )
    return Rig(tiny=tiny, model=tiny.load(), shard=shard, expected=[greedy(tiny, ids) for ids in PROMPTS])


def greedy(tiny: TinyModel, prompt_ids: list[int]) -> list[int]:
    """transformers' own generate, one sequence at a time."""
    token_ids = tiny.oracle.generate(
        torch.tensor([prompt_ids]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return token_ids[0, len(prompt_ids) :].tolist()


def make_engine(rig: Rig, sizes: Mapping[str, int], micro_batches: MicroBatchMode = "auto") -> Engine:
    limits = EngineLimits(
        **({"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 16, "block_size": 4, "max_prompt_logprob_rows": 9} | sizes)
    )
    spec = KvCacheSpec(config=rig.tiny.config, dtype=torch.float32, block_size=limits.block_size)
    kv_cache = KvCache(
        spec,
        num_global_blocks=limits.num_global_blocks,
        num_local_blocks=limits.num_local_blocks,
        device=torch.device("cpu"),
    )
    return Engine(
        model=rig.model,
        kv_cache=kv_cache,
        dispatcher=LocalDispatcher(rig.shard),
        config=rig.tiny.config,
        limits=limits,
        expert_load=rig.shard.load,
        micro_batching=MicroBatching(micro_batches),
    )


def run(engine: Engine, requests: Mapping[str, tuple[list[int], SamplingParams]]) -> dict[str, Produced]:
    for request_id, (prompt_ids, params) in requests.items():
        engine.add(GenerateRequest(request_id=request_id, prompt_ids=prompt_ids, params=params))
    outputs: dict[str, list[Any]] = {request_id: [] for request_id in requests}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.check_integrity()
    return {
        request_id: Produced(
            token_ids=[token_id for output in mine for token_id in output.token_ids],
            logprobs=[entry for output in mine for entry in output.logprobs or []],
            prompt_logprobs=mine[0].prompt_logprobs,
        )
        for request_id, mine in outputs.items()
    }


def greedy_requests() -> dict[str, tuple[list[int], SamplingParams]]:
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return {str(index): (prompt_ids, params) for index, prompt_ids in enumerate(PROMPTS)}


def is_excused(rig: Rig, prompt_ids: list[int], ours: list[int], theirs: list[int]) -> bool:
    """Whether transformers itself was undecided where the two part: between two tokens, or two experts."""
    first = next(index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
    token_ids = torch.tensor([[*prompt_ids, *theirs[:first]]])
    with torch.no_grad():
        result = rig.tiny.oracle(token_ids, output_router_logits=True, use_cache=False)
    rows = [result.logits[0, -1:], *result.router_logits]
    return any((margin(row) < SMALLEST_MARGIN).any() for row in rows)


def margin(scores: torch.Tensor) -> torch.Tensor:
    best, second = scores.topk(2, dim=-1).values.unbind(-1)
    return best - second


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_tokens_are_transformers(rig: Rig, name: str) -> None:
    engine = make_engine(rig, SETTINGS[name])
    produced = run(engine, greedy_requests())
    pairs = [(ids, produced[str(i)].token_ids, rig.expected[i]) for i, ids in enumerate(PROMPTS)]
    different = [pair for pair in pairs if pair[1] != pair[2]]
    assert all(is_excused(rig, *pair) for pair in different)
    assert len(different) <= 1
    print(f"{name}: {len(different)} of {len(PROMPTS)} sequences part from transformers at a near tie")
    check_what_happened(engine.stats(), name)


def check_what_happened(stats: EngineStats, name: str) -> None:
    """The setting did what it is there for, and left nothing behind."""
    assert (stats.num_preemptions > 0) == name.startswith(("few", "whole")), stats.num_preemptions
    assert (stats.num_cached_tokens > 0) or name == "ample"
    assert stats.num_free_blocks == stats.num_blocks
    assert stats.num_generated_tokens == len(PROMPTS) * NUM_TOKENS
    assert sum(tokens for _, _, tokens in stats.expert_load) > 0


def mixed_requests() -> dict[str, tuple[list[int], SamplingParams]]:
    """All kinds of sampling beside each other; prompt logprobs of some."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 5, "top_p": 0.9},
        {"temperature": 0.8, "seed": 6, "repetition_penalty": 1.2, "num_prompt_logprobs": 2},
        {"temperature": 1.2, "seed": 7, "top_k": 40, "min_p": 0.01, "frequency_penalty": 0.2},
    ]
    return {
        str(index): (prompt_ids, SamplingParams(max_tokens=32, num_logprobs=5, ignore_eos=True, **kinds[index % 4]))
        for index, prompt_ids in enumerate(PROMPTS)
    }


def test_tokens_and_logprobs_are_bit_for_bit_the_same_alone_and_in_a_batch(rig: Rig) -> None:
    requests = mixed_requests()
    engine = make_engine(rig, SETTINGS["few blocks"])
    together = run(engine, requests)
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_cached_tokens > 0
    for request_id in requests:
        alone = run(make_engine(rig, AMPLE), {request_id: requests[request_id]})
        assert alone[request_id] == together[request_id]


def test_tokens_and_logprobs_are_bit_for_bit_the_same_in_any_chunking(rig: Rig) -> None:
    requests = dict(list(mixed_requests().items())[1::3])
    whole = run(make_engine(rig, AMPLE | {"max_num_batched_tokens": 2000, "max_prompt_logprob_rows": 200}), requests)
    for budget in (1, 13):
        assert run(make_engine(rig, AMPLE | {"max_num_batched_tokens": budget}), requests) == whole


def test_prompt_logprobs_are_transformers(rig: Rig) -> None:
    prompt_ids = PROMPTS[8]
    params = SamplingParams(temperature=0.0, max_tokens=1, num_prompt_logprobs=0)
    entries = run(make_engine(rig, SETTINGS["small budget"]), {"r": (prompt_ids, params)})["r"].prompt_logprobs
    assert entries is not None
    expected = torch.log_softmax(rig.tiny.oracle_logits(prompt_ids), dim=-1)
    for position, entry in enumerate(entries[1:], start=1):
        assert entry is not None
        assert entry.logprob == pytest.approx(expected[position - 1, prompt_ids[position]].item(), abs=5e-5)


def test_steps_in_two_micro_batches_have_the_bits_of_whole_ones(rig: Rig) -> None:
    whole = run(make_engine(rig, SETTINGS["few blocks"], "off"), mixed_requests())
    halved = run(make_engine(rig, SETTINGS["few blocks"], "on"), mixed_requests())
    assert halved == whole
