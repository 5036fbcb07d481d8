"""Many streams at once, each read by a thread of its own, for faults that come in their middle."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from answers import Ask
from conftest import Service
from tiny_models import prompt

from cluster.client import ArrieroClient
from cluster.client_types import FinishReason, RetryPolicy, Sampling

NUM_STREAMS = 10
MAX_TOKENS = 300
WARM_TOKENS = 5
# A replacement starts a process and imports torch, on a machine that may be busy.
WHOLE_S = 120.0
ASKS = [
    Ask(
        prompt_ids=prompt(length, seed=length),
        sampling=Sampling(max_tokens=MAX_TOKENS, ignore_eos=True, temperature=0.7),
        seed=length,
    )
    for length in range(3, 3 + 7 * NUM_STREAMS, 7)
]


@dataclass
class Stream:
    """pauses_s: between two messages."""

    token_ids: list[int] = field(default_factory=list)
    end: FinishReason | None = None
    longest_pause_s: float = 0.0
    began: threading.Event = field(default_factory=threading.Event)

    def read(self, client: ArrieroClient, ask: Ask, salt: str) -> None:
        last_s = None
        for piece in client.generate(
            ask.prompt_ids, sampling=ask.sampling, seed=ask.seed, cache_salt=salt, timeout_s=200
        ):
            now_s = time.monotonic()
            if last_s is not None:
                self.longest_pause_s = max(self.longest_pause_s, now_s - last_s)
            last_s = now_s
            assert not piece.degraded
            self.token_ids += piece.token_ids
            self.end = piece.finish_reason or self.end
            if len(self.token_ids) >= WARM_TOKENS:
                self.began.set()


class Crowd:
    """All asks at once, each read by a thread of its own; no client tries again by itself."""

    def __init__(self, service: Service, salt: str, asks: Sequence[Ask] = ASKS) -> None:
        self._client = ArrieroClient(
            service.cluster.grpc_address, application=service.app_name, retry=RetryPolicy(max_tries=1)
        )
        self._threads = ThreadPoolExecutor(len(asks))
        self.streams = [Stream() for _ in asks]
        self._reads: list[Future[None]] = [
            self._threads.submit(stream.read, self._client, ask, salt)
            for stream, ask in zip(self.streams, asks, strict=True)
        ]

    def wait_until_warm(self) -> None:
        for stream, read in zip(self.streams, self._reads, strict=True):
            while not stream.began.wait(0.5):
                assert not read.done(), read.exception()

    def assert_all_open(self) -> None:
        assert not any(read.done() for read in self._reads), "the fault comes too late to hit this stream"

    @property
    def is_over(self) -> bool:
        return all(read.done() for read in self._reads)

    def finish(self) -> list[list[int]]:
        """The tokens of each; raises what a stream has raised."""
        for read in self._reads:
            read.result(240)
        self._threads.shutdown()
        self._client.close()
        assert all(stream.end == "length" for stream in self.streams)
        return [stream.token_ids for stream in self.streams]
