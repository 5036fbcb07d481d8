"""An answer depends on its request alone: not on who else asks, nor on how the service is built. Bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from answers import Answer, Ask, ask, ask_all, ask_all_with_usage, ask_choices
from conftest import RunApp, Service
from tiny_models import prompt

from cluster.client_types import Sampling

MAX_LOGPROBS = 20
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.8, "repetition_penalty": 1.2, "prompt_logprobs": MAX_LOGPROBS},
    {"temperature": 1.2, "top_k": 40, "min_p": 0.01, "frequency_penalty": 0.2, "logit_bias": {7: 2.5}},
]
REQUESTS = [
    Ask(
        prompt_ids=prompt(length, seed=length),
        sampling=Sampling(max_tokens=40, ignore_eos=True, logprobs=MAX_LOGPROBS, **KINDS[index % len(KINDS)]),
        seed=100 + index,
    )
    for index, length in enumerate((1, 5, 16, 17, 23, 40, 48, 53, 61, 66, 77, 90))
]
WARM = Sampling(temperature=1.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def alone(service: Service) -> list[Answer]:
    """Each request with the service to itself: two routers of one thread, three shards behind tcp."""
    return [ask(service, request) for request in REQUESTS]


@pytest.fixture(scope="module")
def local(run_app: RunApp) -> Iterator[Service]:
    """Experts in the router; and other steps, other blocks, another number of threads than ``service`` has."""
    sizes = {"max_model_len": 160, "block_size": 4, "num_kv_blocks": 100, "max_num_batched_tokens": 37}
    with run_app("local", routers=1, shards=0, router_threads=2, **sizes) as running:
        yield running


def test_answers_are_the_same_in_a_crowd(service: Service, alone: list[Answer]) -> None:
    assert ask_all(service, [replace(request, cache_salt="crowd") for request in REQUESTS]) == alone


def test_answers_are_the_same_from_the_prefix_cache(service: Service, alone: list[Answer]) -> None:
    answered = ask_all_with_usage(service, REQUESTS)
    assert [answer for answer, _ in answered] == alone
    assert sum(usage.cached_tokens for _, usage in answered) > 0


def test_answers_are_the_same_with_and_without_shards(local: Service, alone: list[Answer]) -> None:
    assert ask_all(local, REQUESTS) == alone
    assert [ask(local, request) for request in REQUESTS[::3]] == alone[::3]


def test_choices_differ_and_each_depends_on_seed_and_index_alone(service: Service) -> None:
    prompt_ids = prompt(53, seed=1)
    four = ask_choices(service, Ask(prompt_ids=prompt_ids, sampling=WARM, seed=3, n=4))
    seven = ask_choices(service, Ask(prompt_ids=prompt_ids, sampling=WARM, seed=3, n=7))
    other_seed = ask_choices(service, Ask(prompt_ids=prompt_ids, sampling=WARM, seed=4, n=4))
    assert seven[:4] == four
    assert len({answer.token_ids for answer in seven + other_seed}) == 11
