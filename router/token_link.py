"""One gateway's end of the token path, seen from the engine process: a connection that never blocks a step."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass

from experts.opening import CHALLENGE_BYTES
from experts.transport.exact_read import read_exactly
from router.abort_reader import AbortReader
from router.messages import Abort
from router.token_opening import MAX_BATCH_BYTES, WELCOME_BYTES, check_welcome, frame, make_answer

_FLUSH_POLL_S = 0.005
# Of aborts, read in one turn: hundreds.
_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLimits:
    """connect_timeout_s: connecting and opening. stall_timeout_s: how long a gateway may take nothing while bytes
    wait for it. max_backlog_bytes: how many may wait before a further batch finds the gateway too slow; more than
    one batch, as even a fast gateway does not take the largest within a step."""

    connect_timeout_s: float = 5.0
    stall_timeout_s: float = 10.0
    max_backlog_bytes: int = 2 * MAX_BATCH_BYTES


class TokenLink:
    """Opens in a thread of its own; all else happens in the caller's thread, without waiting.

    ``lost`` says why the link is of no use any more, None while it is: there is no silent reconnect, as the
    gateway would not know which batches are missing.
    """

    def __init__(self, address: str, *, router_id: str, secret: bytes, limits: LinkLimits) -> None:
        """address is "host:port". Raises ValueError if it is not."""
        host, port = _split_address(address)
        self.address = address
        self.lost: str | None = None
        self._limits = limits
        self._backlog: deque[memoryview] = deque()
        self._backlog_bytes = 0
        self._aborts = AbortReader()
        self._last_progress = time.monotonic()
        # Filled by the opening thread, one or the other, as the last thing it does.
        self._socket: socket.socket | None = None
        self._opening_error: str | None = None
        thread = threading.Thread(
            target=self._open, args=(host, port, router_id, secret), name=f"open {address}", daemon=True
        )
        thread.start()

    @property
    def has_backlog(self) -> bool:
        return bool(self._backlog)

    def send(self, batch: bytes) -> None:
        """Queues one encoded TokenBatch and sends what the socket takes now."""
        if self.lost is not None:
            return
        if self._backlog_bytes > self._limits.max_backlog_bytes:
            self._lose(f"does not read its tokens: {self._backlog_bytes} bytes wait")
            return
        if not self._backlog:
            self._last_progress = time.monotonic()
        message = frame(batch)
        self._backlog.append(memoryview(message))
        self._backlog_bytes += len(message)
        self._flush()

    def poll(self) -> list[Abort]:
        """Sends what the socket takes now and returns what the gateway says; notices one that is gone, has stopped
        reading or says what it should not."""
        if self.lost is None and self._opening_error is not None:
            self._lose(self._opening_error)
        self._flush()
        aborts = self._hear()
        if self._backlog and time.monotonic() - self._last_progress > self._limits.stall_timeout_s:
            self._lose(f"has read nothing for {self._limits.stall_timeout_s} s")
        return aborts

    def close(self, timeout_s: float) -> None:
        """Hangs up once all is sent, at the latest after timeout_s. Idempotent."""
        deadline = time.monotonic() + timeout_s
        while self._backlog and self.lost is None and time.monotonic() < deadline:
            time.sleep(_FLUSH_POLL_S)
            self.poll()
        if self.lost is None:
            self._lose("closed")

    def _flush(self) -> None:
        """Sends what the socket takes now."""
        if self.lost is None and self._socket is not None:
            try:
                self._send_backlog(self._socket)
            except OSError as error:
                self._lose(f"sending failed: {error}")

    def _hear(self) -> list[Abort]:
        """What has come from the gateway since the last time."""
        if self.lost is not None or self._socket is None:
            return []
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            self._lose(f"receiving failed: {error}")
            return []
        if not data:
            self._lose("hung up")
        try:
            return self._aborts.feed(data)
        except ValueError as error:
            self._lose(f"says what is no abort: {error}")
            return []

    def _send_backlog(self, sock: socket.socket) -> None:
        while self._backlog:
            first = self._backlog[0]
            try:
                num_sent = sock.send(first)
            except BlockingIOError:
                return
            self._last_progress = time.monotonic()
            self._backlog_bytes -= num_sent
            if num_sent == len(first):
                self._backlog.popleft()
            else:
                self._backlog[0] = first[num_sent:]

    def _lose(self, reason: str) -> None:
        self.lost = f"gateway {self.address} {reason}"
        self._backlog.clear()
        self._backlog_bytes = 0
        if self._socket is not None:
            self._socket.close()

    def _open(self, host: str, port: int, router_id: str, secret: bytes) -> None:
        deadline = time.monotonic() + self._limits.connect_timeout_s
        sock: socket.socket | None = None
        try:
            sock = socket.create_connection((host, port), timeout=self._limits.connect_timeout_s)
            self._introduce(sock, router_id, secret, deadline)
        except (OSError, ValueError) as error:
            # A ValueError is an OpeningError, an id too long to introduce ourselves with, or no host name at all.
            if sock is not None:
                sock.close()
            self._opening_error = f"could not be reached: {error}"
            return
        self._socket = sock
        if self.lost is not None:  # closed meanwhile, by a thread that may not have seen the socket yet
            with contextlib.suppress(OSError):
                sock.close()

    def _introduce(self, sock: socket.socket, router_id: str, secret: bytes, deadline: float) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # For a host that vanishes with all our bytes in its kernel's hands; the other cases are ours to tell.
            dead_after_ms = round(2000 * self._limits.stall_timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, dead_after_ms)
        challenge = read_exactly(sock, CHALLENGE_BYTES, deadline)
        answer = make_answer(challenge, secret=secret, address=self.address, router_id=router_id)
        sock.sendall(answer)
        welcome = read_exactly(sock, WELCOME_BYTES, deadline)
        check_welcome(welcome, challenge=challenge, answer=answer, secret=secret)
        sock.setblocking(False)


def _split_address(address: str) -> tuple[str, int]:
    host, _colon, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"return_address must be host:port, not {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)
