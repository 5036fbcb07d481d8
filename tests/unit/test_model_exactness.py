"""In float32 a row's bits depend on nothing but its sequence: compared with torch.equal, never with a tolerance.

With the compiled kernels and without: which of the two compute changes bits, and nothing else does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from kernel_choice import KERNELS, kernels
from paged_runner import PagedRunner, RunningSequence, make_runner
from tiny_models import LONG, MAVERICK, SCOUT, UNEVEN, WIDE, TinyModel, make_tiny, prompt

from router import attention_plan

CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "scout": (SCOUT, 90),
    "topk2": (SCOUT | {"num_experts_per_tok": 2}, 90),
    "maverick": (MAVERICK, 90),
    "query_head_per_kv_head": (SCOUT | {"num_key_value_heads": 8, "num_hidden_layers": 4}, 90),
    "uneven": (UNEVEN, 90),
    "long": (LONG, 700),
    "wide": (WIDE, 330),
}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyModel, int]:
    config, length = CONFIGS[request.param]
    return make_tiny(config, tmp_path_factory.mktemp(request.param)), length


@pytest.fixture(autouse=True, params=KERNELS)
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    with kernels(request.param):
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pieces(total: int, rng: random.Random) -> list[int]:
    """``total`` as a random sum of small and large parts."""
    counts = []
    while total:
        counts.append(min(total, rng.choice((1, 1, 2, 3, 5, 8, 17, 64, 200))))
        total -= counts[-1]
    return counts


def run_together(runner: PagedRunner, prompts: list[list[int]], rng: random.Random) -> list[torch.Tensor]:
    """Random subsets of the sequences, in random order, advance by random counts until all are done."""
    sequences = [RunningSequence(token_ids) for token_ids in prompts]
    todo = {index: pieces(len(token_ids), rng) for index, token_ids in enumerate(prompts)}
    while todo:
        chosen = rng.sample(sorted(todo), rng.randint(1, len(todo)))
        runner.step([(sequences[index], todo[index].pop()) for index in chosen])
        todo = {index: counts for index, counts in todo.items() if counts}
    return [torch.cat(sequence.logits) for sequence in sequences]


def test_chunking_changes_no_bit(case: tuple[TinyModel, int]) -> None:
    tiny, length = case
    token_ids = prompt(length, seed=1)
    whole = make_runner(tiny).run(token_ids)
    for seed in range(3):
        counts = pieces(length, random.Random(seed))
        assert torch.equal(make_runner(tiny).run(token_ids, counts), whole)


def test_token_by_token_has_the_bits_of_whole_prefill(case: tuple[TinyModel, int]) -> None:
    tiny, length = case
    token_ids = prompt(length, seed=1)
    head = max(0, length - 90)
    counts = [head] * (head > 0) + [1] * (length - head)
    assert torch.equal(make_runner(tiny).run(token_ids, counts), make_runner(tiny).run(token_ids))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_company_in_the_batch_changes_no_bit(case: tuple[TinyModel, int], num_threads: int) -> None:
    tiny, length = case
    prompts = [prompt(count, seed=count) for count in (length, length // 2, 13, length // 3, 2)]
    alone = [make_runner(tiny).run(token_ids) for token_ids in prompts]
    with threads(num_threads):
        together = run_together(make_runner(tiny), prompts, random.Random(num_threads))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_block_table_order_changes_no_bit(case: tuple[TinyModel, int]) -> None:
    tiny, length = case
    token_ids = prompt(length, seed=2)
    runs = [make_runner(tiny, block_seed=seed).run(token_ids) for seed in (0, 1)]
    assert torch.equal(runs[0], runs[1])


def test_thread_count_changes_no_bit(case: tuple[TinyModel, int]) -> None:
    tiny, length = case
    token_ids = prompt(length, seed=3)
    with threads(1):
        one = make_runner(tiny).run(token_ids, [length - 2, 1, 1])
    with threads(2):
        two = make_runner(tiny).run(token_ids, [length - 2, 1, 1])
    assert torch.equal(one, two)


def test_memory_bound_of_a_prefill_changes_no_bit(case: tuple[TinyModel, int], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, length = case
    token_ids = prompt(length, seed=4)
    wide = make_runner(tiny).run(token_ids)
    monkeypatch.setattr(attention_plan, "MAX_BATCH_NUMBERS", 1)
    assert torch.equal(make_runner(tiny).run(token_ids), wide)


def test_what_a_block_held_before_changes_no_bit(case: tuple[TinyModel, int]) -> None:
    tiny, length = case
    token_ids = prompt(length, seed=5)
    clean = make_runner(tiny).run(token_ids)
    runner = make_runner(tiny)
    generator = torch.Generator().manual_seed(0)
    for layer in range(tiny.config.num_hidden_layers):
        kv = runner.kv.layer(layer)
        for cache_BKSD in (kv.keys_BKSD, kv.values_BKSD):
            cache_BKSD[1:] = torch.randn(cache_BKSD[1:].shape, generator=generator)
    assert torch.equal(runner.run(token_ids, [length // 2, length - length // 2]), clean)
