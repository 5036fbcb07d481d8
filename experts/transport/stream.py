"""A non-blocking socket with an outgoing queue and a parser for what comes in."""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Generator, Iterable

import torch

from experts.transport.base import LinkError

# Yields a buffer to be filled completely and is resumed when it is: a message format as straight code.
Parser = Generator[memoryview, None, None]

# One turn of reading: long messages arrive in frames, so that one connection cannot hold up the others.
_FRAME_BYTES = 1 << 20
# Linux takes at most 1024 buffers in one call (IOV_MAX).
_MAX_BUFFERS = 512
_SCRATCH_BYTES = 1 << 16
# Short messages are read in one call, into a buffer from which the parser gets its pieces.
_STAGING_BYTES = 1 << 16


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    flat = tensor.detach().view(torch.uint8).numpy().reshape(-1)
    return flat.data


def discard(num_bytes: int) -> Parser:
    """Reads bytes that nobody wants without allocating room for them all."""
    scratch = memoryview(bytearray(min(num_bytes, _SCRATCH_BYTES)))
    while num_bytes > 0:
        chunk = scratch[:num_bytes]
        yield chunk
        num_bytes -= len(chunk)


class ByteStream:
    """Owns the socket. The parser must never end; what it raises comes out of ``receive``.

    num_moved_bytes: that the socket took or gave so far.
    """

    def __init__(self, sock: socket.socket, parser: Parser) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._parser = parser
        self._wanted = next(parser)
        self._outgoing: deque[memoryview] = deque()
        self._staging = memoryview(bytearray(_STAGING_BYTES))
        self.num_moved_bytes = 0

    @property
    def sending(self) -> bool:
        return bool(self._outgoing)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, buffers: Iterable[memoryview | bytes]) -> None:
        """Queues the buffers and sends what the socket takes now. Raises LinkError."""
        self._outgoing.extend(memoryview(buffer) for buffer in buffers)
        self.flush()

    def flush(self) -> None:
        """Sends what the socket takes now. Raises LinkError."""
        while self._outgoing:
            buffers = [self._outgoing[index] for index in range(min(len(self._outgoing), _MAX_BUFFERS))]
            try:
                self._drop_sent(self._socket.sendmsg(buffers))
            except BlockingIOError:
                return
            except OSError as error:
                raise LinkError(f"sending failed: {error}") from error

    def _drop_sent(self, num_bytes: int) -> None:
        self.num_moved_bytes += num_bytes
        while num_bytes:
            first = self._outgoing.popleft()
            if len(first) > num_bytes:
                self._outgoing.appendleft(first[num_bytes:])
                return
            num_bytes -= len(first)

    def receive(self) -> None:
        """Feeds the parser with what is there, one frame at most. Raises LinkError, also at the end of the stream."""
        budget = _FRAME_BYTES
        while budget > 0:
            into = self._staging if len(self._wanted) < _STAGING_BYTES else self._wanted[:budget]
            try:
                count = self._socket.recv_into(into)
            except BlockingIOError:
                return
            except OSError as error:
                raise LinkError(f"receiving failed: {error}") from error
            if count == 0:
                raise LinkError("closed by the other end")
            self.num_moved_bytes += count
            self._feed(into, count)
            if count < len(into):
                # Nothing more is there, most likely; if there is, the poller says so.
                return
            budget -= count

    def _feed(self, received: memoryview, count: int) -> None:
        if received is not self._staging:
            self._advance(count)
            return
        start = 0
        while start < count:
            piece = min(count - start, len(self._wanted))
            self._wanted[:piece] = received[start : start + piece]
            self._advance(piece)
            start += piece

    def _advance(self, count: int) -> None:
        self._wanted = self._wanted[count:]
        if not self._wanted:
            self._wanted = next(self._parser)

    def close(self) -> None:
        """Idempotent. Frees the parser and what it holds."""
        self._parser.close()
        self._outgoing.clear()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def tune(sock: socket.socket, *, dead_after_s: float) -> None:
    """No Nagle delay; a host that vanished without a word is noticed after about dead_after_s."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    seconds = max(1, round(dead_after_s / 4))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(dead_after_s * 1000))
