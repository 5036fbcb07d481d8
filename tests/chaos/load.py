"""Clients: so many streams at once, each read by a thread of its own, which asks again as soon as it has its answer."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from conditions import wait_until

from chaos.record import StreamRecord
from cluster.client import ArrieroClient
from cluster.client_types import ArrieroError, RetryPolicy, Sampling

# Nothing may hang: a stream that takes longer is lost.
STREAM_S = 240.0
MAX_PROMPT_TOKENS = 72
MAX_TOKEN_ID = 250
# None of the model's special tokens.
MIN_TOKEN_ID = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    prompt_ids: tuple[int, ...]
    seed: int
    sampling: Sampling


def draw_asks(count: int, max_tokens: int, draw: random.Random) -> list[Ask]:
    """Prompts and answers of all lengths, so that streams begin and end at all times."""
    return [
        Ask(
            prompt_ids=tuple(draw.choices(range(MIN_TOKEN_ID, MAX_TOKEN_ID), k=draw.randint(1, MAX_PROMPT_TOKENS))),
            seed=draw.randrange(2**32),
            sampling=Sampling(
                max_tokens=draw.randint(max_tokens // 2, max_tokens),
                ignore_eos=True,
                temperature=draw.choice((0.0, 0.7)),
            ),
        )
        for _ in range(count)
    ]


class Load:
    """num_rounds: how often each client asks; None: until stop(). label begins the request ids. Clients that may not
    resume raise where their call breaks; one that has lost a stream asks no more."""

    def __init__(
        self,
        address: str,
        application: str,
        asks: Sequence[Ask],
        *,
        label: str,
        resume: bool = False,
        num_rounds: int | None = None,
    ) -> None:
        retry = RetryPolicy() if resume else RetryPolicy(max_tries=1)
        self._client = ArrieroClient(address, application=application, retry=retry)
        self._asks = asks
        self._label = label
        self._num_rounds = num_rounds
        self._stopping = threading.Event()
        self._records: list[list[StreamRecord]] = [[] for _ in asks]
        self._threads = ThreadPoolExecutor(len(asks))
        self._clients: list[Future[None]] = [self._threads.submit(self._keep_asking, ask) for ask in range(len(asks))]

    @property
    def num_clients(self) -> int:
        return len(self._asks)

    def records(self) -> list[StreamRecord]:
        return [record for of_client in self._records for record in list(of_client)]

    def open_streams(self) -> list[StreamRecord]:
        """Those that have had a message and have not ended."""
        last = [of_client[-1] for of_client in self._records if of_client]
        return [each for each in last if each.ended_s is None and each.arrivals_s]

    def num_tokens(self) -> int:
        return sum(len(record.token_ids) for record in self.records())

    def wait_for_tokens(self, count: int) -> None:
        """Until so many more have come."""
        wanted = self.num_tokens() + count
        wait_until(lambda: self.num_tokens() >= wanted, f"{count} more tokens", STREAM_S, every_s=0.02)

    def wait_until_all_began(self) -> None:
        wait_until(lambda: all(self._records) and self.open_streams(), "all clients have asked")

    def finish(self) -> list[StreamRecord]:
        """Of all streams, after the end of the last one; raises what is no error of the service."""
        for client in self._clients:
            client.result(2 * STREAM_S)
        return self.records()

    def stop(self) -> None:
        """No new streams; those that are open go on to their ends."""
        self._stopping.set()

    def close(self) -> None:
        self.stop()
        self._client.close()
        self._threads.shutdown()

    def _keep_asking(self, number: int) -> None:
        for count in itertools.count() if self._num_rounds is None else range(self._num_rounds):
            if self._stopping.is_set():
                return
            request_id = f"{self._label}-{number}-{count}"
            record = StreamRecord(request_id=request_id, ask=number, opened_s=time.monotonic())
            self._records[number].append(record)
            # Every other stream computes its prompt anew, whatever is cached.
            self._read(record, cache_salt=request_id if count % 2 else "")
            if record.error is not None:
                return

    def _read(self, record: StreamRecord, cache_salt: str) -> None:
        ask = self._asks[record.ask]
        try:
            for piece in self._client.generate(
                ask.prompt_ids,
                sampling=ask.sampling,
                seed=ask.seed,
                request_id=record.request_id,
                cache_salt=cache_salt,
                timeout_s=STREAM_S,
            ):
                record.token_ids.extend(piece.token_ids)
                record.num_finishes += piece.finish_reason is not None
                record.is_degraded |= piece.degraded
                record.arrivals_s.append(time.monotonic())
        except ArrieroError as error:
            record.error = str(error)
        record.ended_s = time.monotonic()


@contextmanager
def running_load(address: str, application: str, asks: Sequence[Ask], *, label: str, resume: bool) -> Iterator[Load]:
    """Leaves with all streams broken off when something fails, and none when the caller has finished them."""
    load = Load(address, application, asks, label=label, resume=resume)
    try:
        yield load
    finally:
        load.close()
