"""What nobody waits for any more gives its place to the next within a second."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
from conftest import RunApp, Service, Tell
from tiny_models import prompt

from cluster.client import ArrieroClient
from cluster.client_stream import GenerationStream
from cluster.client_types import ArrieroError, RetryPolicy, Sampling

NUM_DROPS = 10
FREED_WITHIN_S = 1.0
TIMEOUT_S = 60.0
ENDLESS = Sampling(max_tokens=3900, ignore_eos=True)
PROMPT = prompt(4, seed=1)
SEED = 1
ONE_TOKEN = Sampling(max_tokens=1, ignore_eos=True)


@pytest.fixture(scope="module")
def service(run_app: RunApp) -> Iterator[Service]:
    """One sequence at a time: the next one's first token says that the last one's blocks are free. Steps of few tokens,
    so that a prompt can take long."""
    with run_app("aborts", shards=0, max_num_seqs=1, max_num_batched_tokens=8) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[ArrieroClient]:
    retry = RetryPolicy(max_tries=1)
    with ArrieroClient(service.cluster.grpc_address, application=service.app_name, retry=retry) as client:
        yield client


def endless(client: ArrieroClient, num_prompt_tokens: int = 4) -> GenerationStream:
    return client.generate(prompt(num_prompt_tokens, seed=1), sampling=ENDLESS, timeout_s=TIMEOUT_S)


def next_ones_wait_s(client: ArrieroClient, drop: GenerationStream) -> float:
    """From a drop until another stream, which has waited for its turn, has its first token."""
    turn = client.generate(prompt(4, seed=2), sampling=ONE_TOKEN, timeout_s=TIMEOUT_S)
    drop.close()
    began_s = time.monotonic()
    assert [token_id for piece in turn for token_id in piece.token_ids]
    return time.monotonic() - began_s


def report(tell: Tell, waits_s: list[float]) -> None:
    tell(", ".join(f"{1000 * wait_s:.0f}" for wait_s in waits_s) + " ms from a drop to the next one's first token")
    assert statistics.median(waits_s) < FREED_WITHIN_S


def test_a_client_that_leaves_while_tokens_come_makes_room_within_a_second(client: ArrieroClient, tell: Tell) -> None:
    waits_s = []
    for number in range(NUM_DROPS):
        stream = endless(client)
        opened_s = time.monotonic()
        next(stream)
        leave_s = opened_s + 0.1 + 0.7 * number / NUM_DROPS
        while time.monotonic() < leave_s:
            next(stream)
        waits_s.append(next_ones_wait_s(client, stream))
    report(tell, waits_s)


def test_a_client_that_leaves_before_its_first_token_makes_room_within_a_second(
    client: ArrieroClient, tell: Tell
) -> None:
    waits_s = []
    for number in range(NUM_DROPS):
        stream = endless(client, num_prompt_tokens=3900)
        first: list[int] = []

        def read(stream: GenerationStream = stream, first: list[int] = first) -> None:
            with suppress(ArrieroError):
                first.extend(token_id for piece in stream for token_id in piece.token_ids)

        reader = threading.Thread(target=read)
        reader.start()
        reader.join(0.01 + 0.09 * number / NUM_DROPS)
        waits_s.append(next_ones_wait_s(client, stream))
        reader.join()
        assert first == [], "the prompt is too short"
    report(tell, waits_s)


def test_a_stop_string_makes_room_within_a_second(client: ArrieroClient, tell: Tell) -> None:
    some = list(
        client.generate(PROMPT, sampling=Sampling(max_tokens=40, ignore_eos=True), seed=SEED, timeout_s=TIMEOUT_S)
    )
    stop = "".join(piece.text for piece in some)[-3:]
    waits_s = []
    for _ in range(NUM_DROPS):
        stream = client.generate(PROMPT, sampling=replace(ENDLESS, stop=(stop,)), seed=SEED, timeout_s=TIMEOUT_S)
        assert list(stream)[-1].finish_reason == "stop"
        waits_s.append(next_ones_wait_s(client, stream))
    report(tell, waits_s)
