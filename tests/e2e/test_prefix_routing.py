"""A prompt goes to the router that has its beginning, and a prompt that everybody sends goes to all of them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from answers import Ask, ask_all_with_usage
from conftest import Service, Tell, wait_until
from tiny_models import prompt

from cluster.client_types import Sampling
from cluster.config import ServiceConfig
from cluster.v1 import admin_pb2, admin_pb2_grpc

pytestmark = pytest.mark.cluster

# Each drawn router is right by chance half the time: all of these once in four thousand runs.
NUM_PROMPTS = 12
NUM_TOKENS = 48
SALT = "prefix routing"


def num_by_router(service: Service) -> dict[str, int]:
    with grpc.insecure_channel(service.cluster.grpc_address) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        request = admin_pb2.ListRequestsRequest()
        found = stub.ListRequests(request, metadata=service.admin_metadata, timeout=10).requests
    routers = [choice.router_id for choice in found]
    return {router: routers.count(router) for router in set(routers) - {""}}


def test_prompts_that_come_again_find_the_router_that_has_them(service: Service, tell: Tell) -> None:
    first = [
        Ask(prompt_ids=prompt(NUM_TOKENS, seed=seed), sampling=Sampling(max_tokens=1), cache_salt=SALT)
        for seed in range(NUM_PROMPTS)
    ]
    again = [Ask(prompt_ids=[*ask.prompt_ids, 7, 8, 9], sampling=ask.sampling, cache_salt=SALT) for ask in first]
    usages = [[ask_all_with_usage(service, [ask])[0][1].cached_tokens for ask in asks] for asks in (first, again)]
    tell(f"cached tokens: {usages[0]}, and again: {usages[1]}")
    assert usages[0] == [0] * NUM_PROMPTS
    assert min(usages[1]) > 0


def test_a_prompt_that_everybody_sends_does_not_pile_up_on_one_router(service: Service, tell: Tell) -> None:
    gap = ServiceConfig(model="m").prefix_gap
    num_streams = 2 * gap
    ids, hot = prompt(NUM_TOKENS, seed=99), Sampling(max_tokens=900, ignore_eos=True)
    ask_all_with_usage(service, [Ask(prompt_ids=ids, sampling=Sampling(max_tokens=1), cache_salt=SALT)])
    leave = threading.Event()

    def follow(began: threading.Event) -> None:
        with service.client() as client:
            for _ in client.generate(ids, sampling=hot, seed=1, cache_salt=SALT, timeout_s=120):
                began.set()
                if leave.is_set():
                    return

    with ThreadPoolExecutor(num_streams) as threads:
        streams = []
        try:
            # One after the other: of those that are under way to a router at once a gateway knows too little.
            for _ in range(num_streams):
                began = threading.Event()
                streams.append(threads.submit(follow, began))
                assert began.wait(60)
            wait_until(lambda: sum(num_by_router(service).values()) == num_streams, "all streams are with a router")
            spread = sorted(num_by_router(service).values())
        finally:
            leave.set()
        for stream in streams:
            stream.result(60)
    tell(f"{num_streams} streams of one prompt, by router: {spread}")
    assert len(spread) == 2
    assert spread[1] - spread[0] <= gap + 2
