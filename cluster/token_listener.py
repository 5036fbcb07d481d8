"""The gateway's end of the token path: routers connect here and send one TokenBatch per step.

Only a router that knows the cluster secret gets past the opening (router/token_opening.py), and only then is
anything of a size it names allocated, up to a limit. Everything runs in one event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import msgspec

from cluster.relay import Event, LinkLost
from experts.opening import ANSWER_BYTES, OpeningError
from router.messages import TokenBatch, decode_token_batch
from router.token_opening import LENGTH, MAX_BATCH_BYTES, check_router, make_challenge, make_welcome

logger = logging.getLogger(__name__)


class _Ear:
    """Who waits for one attempt of one choice. feeder: the connection its outputs come from, None before any."""

    def __init__(self, deliver: Callable[[Event], None]) -> None:
        self.deliver = deliver
        self.feeder: asyncio.StreamWriter | None = None


class TokenListener:
    """Listens on a port of the system's choice. ``start`` it, then ``listen`` before a request is submitted."""

    def __init__(
        self, *, host: str, secret: bytes, opening_timeout_s: float = 5.0, max_batch_bytes: int = MAX_BATCH_BYTES
    ) -> None:
        """host: this node's address as routers reach it. Raises ValueError for an empty secret."""
        if not secret:
            raise ValueError("secret is empty: routers must be able to prove themselves")
        self.num_late_outputs = 0
        self.num_refused = 0
        self._host = host
        self._secret = secret
        self._opening_timeout_s = opening_timeout_s
        self._max_batch_bytes = max_batch_bytes
        self._ears: dict[tuple[str, int], _Ear] = {}
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self._address = ""

    @property
    def address(self) -> str:
        """The return_address for requests, host:port. Empty before ``start``."""
        return self._address

    @property
    def num_listening(self) -> int:
        return len(self._ears)

    @property
    def num_connections(self) -> int:
        return len(self._connections)

    async def start(self) -> None:
        """Raises OSError when it cannot listen on host."""
        self._server = await asyncio.start_server(self._serve, self._host, 0, limit=1 << 20)
        port = self._server.sockets[0].getsockname()[1]
        self._address = f"[{self._host}]:{port}" if ":" in self._host else f"{self._host}:{port}"

    @contextmanager
    def listen(self, request_id: str, attempt: int, deliver: Callable[[Event], None]) -> Iterator[None]:
        """While the context is open, deliver is called, in the event loop, with each output of this attempt and
        with LinkLost when the connection they came over ends. What comes outside the context is dropped, counted.

        A router that is lost before its first output is told by its Serve call alone. Raises ValueError when
        somebody listens for this attempt already.
        """
        key = (request_id, attempt)
        if key in self._ears:
            raise ValueError(f"somebody listens for request_id {request_id!r} attempt {attempt} already")
        self._ears[key] = _Ear(deliver)
        try:
            yield
        finally:
            del self._ears[key]

    async def close(self) -> None:
        """Hangs up on all routers, which tells those that listen. Idempotent."""
        if self._server is None:
            return
        self._server.close()
        for writer in tuple(self._connections):
            writer.transport.abort()
        await self._server.wait_closed()
        self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One router's connection, from its first byte to its last."""
        self._connections.add(writer)
        router_id = "a router"
        try:
            async with asyncio.timeout(self._opening_timeout_s):
                router_id = await self._admit(reader, writer)
            while True:
                self._deliver(await self._read_batch(reader), writer)
        except (OpeningError, msgspec.ValidationError, TimeoutError) as error:
            self.num_refused += 1
            logger.warning("token connection of %s refused: %s", router_id, error or "it did not open in time")
        except (asyncio.IncompleteReadError, OSError):
            logger.info("token connection of %s has ended", router_id)
        finally:
            self._connections.discard(writer)
            self._tell_lost(writer, f"the token connection of {router_id} was lost")
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        challenge = make_challenge()
        writer.write(challenge)
        answer = await reader.readexactly(ANSWER_BYTES)
        router_id = check_router(answer, challenge=challenge, secret=self._secret, address=self._address)
        writer.write(make_welcome(challenge=challenge, answer=answer, secret=self._secret))
        return router_id

    async def _read_batch(self, reader: asyncio.StreamReader) -> TokenBatch:
        """Raises msgspec.ValidationError for what is no batch or too large to be one."""
        (num_bytes,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        if num_bytes > self._max_batch_bytes:
            raise msgspec.ValidationError(f"a batch of {num_bytes} bytes, the limit is {self._max_batch_bytes}")
        return decode_token_batch(await reader.readexactly(num_bytes))

    def _deliver(self, batch: TokenBatch, connection: asyncio.StreamWriter) -> None:
        for output in batch.outputs:
            ear = self._ears.get((output.request_id, output.attempt))
            if ear is None:
                self.num_late_outputs += 1
            else:
                ear.feeder = connection
                ear.deliver(output)

    def _tell_lost(self, connection: asyncio.StreamWriter, reason: str) -> None:
        for ear in tuple(self._ears.values()):
            if ear.feeder is connection:
                ear.deliver(LinkLost(reason))
