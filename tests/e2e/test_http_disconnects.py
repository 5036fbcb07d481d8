"""HTTP clients that go away, at whatever moment: their requests end, their blocks are free again."""

from __future__ import annotations

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import WAIT_S, Service, Tell, wait_until
from engine_watch import EngineWatch, is_idle, total

NUM_CLIENTS = 60
NUM_AT_ONCE = 12
MAX_DELAY_S = 0.4
NUM_TOKENS = 3000
# None of the requests ends by itself before it is dropped.
BODY = {"prompt": [5] * 40, "max_tokens": NUM_TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module")
def watch(service: Service) -> EngineWatch:
    return EngineWatch(service)


def open_request(service: Service, data: bytes) -> socket.socket:
    """What has been sent of it is data."""
    host, port = service.cluster.http_address.split(":")
    connection = socket.create_connection((host, int(port)), timeout=WAIT_S)
    connection.sendall(data)
    return connection


def request_bytes(service: Service, **fields: object) -> bytes:
    body = json.dumps({**BODY, **fields}).encode()
    head = f"POST /{service.app_name}/v1/completions HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def read_for(connection: socket.socket, delay_s: float) -> None:
    """Whatever comes; the connection stays open."""
    end_s = time.monotonic() + delay_s
    while (left_s := end_s - time.monotonic()) > 0:
        connection.settimeout(left_s)
        try:
            assert connection.recv(65536), "the service hung up"
        except TimeoutError:
            return


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_goes_ends_its_generation(
    service: Service, watch: EngineWatch, tell: Tell, stream: bool, n: int
) -> None:
    before = total(watch.wait_until_idle(), "num_generated_tokens")
    with open_request(service, request_bytes(service, stream=stream, n=n)) as connection:
        wait_until(lambda: total(watch.stats(), "num_running") == n, "the generation has begun")
        if stream:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    gone_s = time.monotonic()
    wait_until(lambda: all(map(is_idle, watch.stats().values())), "all blocks are free")
    tell(f"seen after {time.monotonic() - gone_s:.2f} s, by engines that report twice a second")
    assert total(watch.stats(), "num_generated_tokens") - before < n * NUM_TOKENS


def test_clients_that_go_at_any_moment_leave_nothing_behind(service: Service, watch: EngineWatch, tell: Tell) -> None:
    before = total(watch.wait_until_idle(), "num_generated_tokens")

    def drop_one(number: int) -> int:
        draw = random.Random(number)
        n, stream = draw.choice((1, 1, 3)), draw.random() < 0.5
        data = request_bytes(service, stream=stream, n=n)
        # Some go before all of the request is sent, some with the first tokens, some at whatever moment.
        moment = draw.choice(("sending", "first tokens", "at once", "soon", "later"))
        sent = data[: draw.randrange(len(data))] if moment == "sending" else data
        with open_request(service, sent) as connection:
            if moment == "first tokens" and stream:
                assert connection.recv(65536)
            read_for(connection, {"soon": 0.01, "later": MAX_DELAY_S}.get(moment, 0.0) * draw.random())
        return n

    with ThreadPoolExecutor(NUM_AT_ONCE) as threads:
        num_choices = sum(threads.map(drop_one, range(NUM_CLIENTS)))
    dropped_s = time.monotonic()
    generated = total(watch.wait_until_idle(), "num_generated_tokens") - before
    tell(f"{generated} tokens for {NUM_CLIENTS} clients, idle for long after {time.monotonic() - dropped_s:.2f} s")
    assert 0 < generated < num_choices * NUM_TOKENS / 10
