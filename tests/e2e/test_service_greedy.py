"""Greedy tokens of many clients at once, over two routers, against transformers: with KV blocks to spare, with too
few of them, and with prefixes in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from answers import Answer, Ask, ask_all, ask_all_with_usage
from conftest import RunApp, Service, Tell
from engine_watch import EngineWatch, total
from oracle_rows import check_greedy, load_tiny
from tiny_models import TinyModel, prompt

from cluster.client_types import Sampling

NUM_TOKENS = 64
GREEDY = Sampling(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
PROMPTS = [prompt(length, seed=length) for length in (1, 2, 7, 15, 16, 17, 25, 31, 33, 48, 53, 64, 66, 75, 80, 90)]
SHARED = prompt(53, seed=1000)
WITH_SHARED = [[*SHARED, *prompt(length, seed=2000 + length)] for length in (*range(1, 12), 16, 17, 26, 30, 37)]
MAX_MODEL_LEN = 160
BLOCK_SIZE = 4
# One sequence of full length fits, and half of another; each router gets about eight.
FEW_BLOCKS = MAX_MODEL_LEN // BLOCK_SIZE * 3 // 2


@pytest.fixture(scope="module")
def tiny(service: Service) -> TinyModel:
    return load_tiny(service.model)


@pytest.fixture(scope="module")
def crowded(run_app: RunApp) -> Iterator[Service]:
    sizes = {"max_model_len": MAX_MODEL_LEN, "block_size": BLOCK_SIZE, "num_kv_blocks": FEW_BLOCKS}
    with run_app("crowded", routers=2, shards=3, max_num_batched_tokens=50, **sizes) as running:
        yield running


def requests(prompts: Sequence[Sequence[int]]) -> list[Ask]:
    return [Ask(prompt_ids=prompt_ids, sampling=GREEDY) for prompt_ids in prompts]


def assert_transformers(
    tiny: TinyModel, prompts: Sequence[Sequence[int]], answers: Sequence[Answer], tell: Tell
) -> None:
    assert [len(answer.token_ids) for answer in answers] == [NUM_TOKENS] * len(prompts)
    checks = [check_greedy(tiny, ids, answer.token_ids) for ids, answer in zip(prompts, answers, strict=True)]
    num_tokens, num_excused = sum(check.num_tokens for check in checks), sum(check.num_excused for check in checks)
    tell(f"{num_excused} of {num_tokens} tokens differ from transformers' at a near tie")
    assert [check.num_wrong for check in checks] == [0] * len(checks)
    # Near ties are rare: more of them are something else.
    assert num_excused <= 2


def test_greedy_tokens_of_two_routers_are_transformers(service: Service, tiny: TinyModel, tell: Tell) -> None:
    watch = EngineWatch(service)
    before = watch.wait_until_idle()
    answers = ask_all(service, requests(PROMPTS))
    assert_transformers(tiny, PROMPTS, answers, tell)
    after = watch.wait_until_idle()
    assert total(after, "num_preemptions") == total(before, "num_preemptions")
    assert len(after) == 2
    assert all(after[router].num_generated_tokens > before[router].num_generated_tokens for router in after)


def test_greedy_tokens_with_shared_prefixes_are_transformers(service: Service, tiny: TinyModel, tell: Tell) -> None:
    answered = ask_all_with_usage(service, requests(WITH_SHARED))
    assert_transformers(tiny, WITH_SHARED, [answer for answer, _ in answered], tell)
    again = ask_all_with_usage(service, requests(WITH_SHARED))
    assert [answer for answer, _ in again] == [answer for answer, _ in answered]
    # The common prefix was computed on either router, at the latest in the first round.
    cached = [usage.cached_tokens for _, usage in again]
    tell(f"tokens from the prefix cache: {cached}")
    assert min(cached) > 0


@pytest.mark.parametrize("prompts", [PROMPTS, WITH_SHARED], ids=["different", "shared prefixes"])
def test_greedy_tokens_of_preempted_sequences_are_transformers(
    crowded: Service, tiny: TinyModel, tell: Tell, prompts: list[list[int]]
) -> None:
    watch = EngineWatch(crowded)
    before = watch.wait_until_idle()
    answers = ask_all(crowded, requests(prompts))
    assert_transformers(tiny, prompts, answers, tell)
    after = watch.wait_until_idle()
    num_preemptions = total(after, "num_preemptions") - total(before, "num_preemptions")
    tell(f"{num_preemptions} preemptions")
    assert num_preemptions > 0
