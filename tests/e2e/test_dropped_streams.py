"""Clients that go away in the middle of things leave nothing behind."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
from answers import Ask, ask
from conftest import RunApp, Service, Tell, wait_until
from engine_watch import EngineWatch, total
from holdings import Holdings, holdings, parent
from tiny_models import prompt

from cluster.client import ArrieroClient
from cluster.client_stream import GenerationStream
from cluster.client_types import ArrieroError, RetryPolicy, Sampling

NUM_STREAMS = 200
NUM_AT_ONCE = 16
MAX_PIECES = 12
MAX_DELAY_S = 0.3
# None of the streams ends by itself before it is dropped.
ENDLESS = Sampling(max_tokens=3000, ignore_eos=True)
GOOD = Ask(prompt_ids=prompt(40, seed=40), sampling=Sampling(max_tokens=16, ignore_eos=True), seed=40)
# Idle connections that Ray opens and closes as it likes.
FD_SLACK = 2
# Buffers of sizes that an allocator has not met before; a leak of 80 KiB for each stream is more.
MEMORY_SLACK_BYTES = 16 * 2**20

Drop = Callable[[ArrieroClient, GenerationStream, random.Random], None]


def after_some_pieces(client: ArrieroClient, stream: GenerationStream, draw: random.Random) -> None:
    for _ in range(draw.randint(1, MAX_PIECES)):
        next(stream)
    stream.close()


def at_any_moment(client: ArrieroClient, stream: GenerationStream, draw: random.Random) -> None:
    """In the queue, in the prefill, between two tokens: whatever goes on then."""
    _read_until(stream, draw.uniform(0.0, MAX_DELAY_S), stream.close)


def with_its_connection(client: ArrieroClient, stream: GenerationStream, draw: random.Random) -> None:
    _read_until(stream, draw.uniform(0.0, MAX_DELAY_S), client.close)


def at_once(client: ArrieroClient, stream: GenerationStream, draw: random.Random) -> None:
    stream.close()


DROPS: tuple[Drop, ...] = (after_some_pieces, at_any_moment, with_its_connection, at_once)


def _read_until(stream: GenerationStream, delay_s: float, drop: Callable[[], None]) -> None:
    timer = threading.Timer(delay_s, drop)
    timer.start()
    try:
        for _ in stream:
            pass
    except ArrieroError as error:
        if error.code != "CANCELLED":
            raise
    timer.join()


def drop_streams(service: Service, count: int, seed: int) -> None:
    """Opens so many streams, NUM_AT_ONCE at a time, each over a connection of its own, and drops every one."""

    def drop_one(number: int) -> None:
        draw = random.Random(f"{seed}/{number}")
        address, retry = service.cluster.grpc_address, RetryPolicy(max_tries=1)
        with ArrieroClient(address, application=service.app_name, retry=retry) as client:
            stream = client.generate(
                prompt(draw.randint(1, 400), seed=number), sampling=ENDLESS, seed=number, n=draw.choice((1, 1, 3))
            )
            draw.choice(DROPS)(client, stream, draw)

    with ThreadPoolExecutor(NUM_AT_ONCE) as threads:
        list(threads.map(drop_one, range(count)))


@pytest.fixture(scope="module")
def service(run_app: RunApp) -> Iterator[Service]:
    """oneDNN keeps code for every number of rows it has met, hundreds of KiB each: few tokens in a step, and a warm
    service has met them all."""
    with run_app("dropped", routers=2, shards=3, max_num_batched_tokens=24) as running:
        yield running


def pids(service: Service) -> dict[str, int]:
    """By the member's id; a router's Serve replica, its engine's parent, is shown beside it."""
    view = service.view()
    found = {member["id"]: member["pid"] for kind in ("gateways", "routers", "shards") for member in view[kind]}
    found[view["controller"]["id"]] = view["controller"]["pid"]
    return found | {f"{router['id']} (replica)": parent(router["pid"]) for router in view["routers"]}


def test_dropped_streams_give_everything_back(service: Service, tell: Tell) -> None:
    watch = EngineWatch(service)
    good_answer = ask(service, GOOD)
    # What is made on first use, and kept, is no loss.
    drop_streams(service, NUM_STREAMS // 2, seed=1)
    generated_before = total(watch.wait_until_idle(), "num_generated_tokens")
    before = holdings(pids(service))
    drop_streams(service, NUM_STREAMS, seed=2)
    num_generated = total(watch.wait_until_idle(timeout_s=10), "num_generated_tokens") - generated_before
    tell(f"{num_generated} tokens in {NUM_STREAMS} streams before they were dropped")
    assert num_generated > 0
    try:
        wait_until(lambda: not losses(before, holdings(pids(service))), "descriptors and memory are back", timeout_s=15)
    finally:
        tell("\n" + "\n".join(changes(before, holdings(pids(service)))))
    assert ask(service, GOOD) == good_answer


def losses(before: Mapping[str, Holdings], after: Mapping[str, Holdings]) -> list[str]:
    """Processes that hold more than before; a process that is another one now counts as well."""
    return [name for name in after if name not in before or _is_more(before[name], after[name])]


def _is_more(before: Holdings, after: Holdings) -> bool:
    return (
        after.num_fds > before.num_fds + FD_SLACK
        or after.num_sockets > before.num_sockets + FD_SLACK
        or after.memory_bytes > before.memory_bytes + MEMORY_SLACK_BYTES
    )


def changes(before: Mapping[str, Holdings], after: Mapping[str, Holdings]) -> Iterator[str]:
    for name, now in after.items():
        then = before.get(name, now)
        yield (
            f"{name}: {now.num_fds - then.num_fds:+} of {now.num_fds} descriptors, "
            f"{now.num_sockets - then.num_sockets:+} of {now.num_sockets} sockets, "
            f"{(now.memory_bytes - then.memory_bytes) / 2**20:+.1f} of {now.memory_bytes / 2**20:.0f} MiB"
        )
