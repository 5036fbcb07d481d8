"""The shard's end of a lane over plain TCP."""

from __future__ import annotations

import os
import socket

import torch

from experts.message import (
    HEADER_BYTES,
    PULSE,
    Header,
    Kind,
    MessageError,
    decode_header,
    decode_rows_per_expert,
    encode_header,
    reply_header,
    rows_per_expert_bytes,
)
from experts.opening import ANSWER_BYTES, NONCE_BYTES, make_challenge
from experts.transport.base import RowRequest
from experts.transport.row_views import RowViews
from experts.transport.rules import LaneRules
from experts.transport.stream import ByteStream, Parser, byte_view, discard, tune

_BACKLOG = 128
# Up to so many rows a request is small.
_SMALL_ROWS = 64


class _RowBuffer:
    """Room for rows, which is used again for small messages."""

    def __init__(self, num_rows: int, rules: LaneRules) -> None:
        x_RD = torch.empty(num_rows, rules.hidden_size, dtype=rules.dtype)
        self.rows = RowViews(x_RD)
        self.memory = byte_view(x_RD)


class TcpListener:
    """Listens on host, on a port of the system's choice if port is 0. Raises OSError if it cannot."""

    def __init__(self, host: str, port: int, rules: LaneRules) -> None:
        self._rules = rules
        self._socket = socket.create_server((host, port), backlog=_BACKLOG)
        self._socket.setblocking(False)
        self.host: str = host
        self.port: int = self._socket.getsockname()[1]

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self, lane: int) -> TcpLane | None:
        """None when nobody was there after all. Raises OSError when the system cannot give another socket."""
        try:
            sock, _peer = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        accepted = TcpLane(sock, lane, self._rules)
        try:
            tune(sock, dead_after_s=self._rules.dead_after_s)
            accepted.challenge()
        except OSError:
            # Gone before it said a word; LinkError is an OSError too.
            accepted.close()
            return None
        return accepted

    def close(self) -> None:
        self._socket.close()


class TcpLane:
    """One router's lane, from the challenge on. Made by ``TcpListener.accept``."""

    transport = "tcp"

    def __init__(self, sock: socket.socket, lane: int, rules: LaneRules) -> None:
        self.lane_id: str | None = None
        self._num_computing = 0
        # Replies handed to the stream since it was last empty.
        self._num_leaving = 0
        self._lane = lane
        self._rules = rules
        self._arrived: list[RowRequest] = []
        self._spare: _RowBuffer | None = None
        self._challenge = make_challenge(os.urandom(NONCE_BYTES))
        self._stream = ByteStream(sock, self._parse())

    @property
    def sending(self) -> bool:
        return self._stream.sending

    @property
    def num_unanswered(self) -> int:
        return self._num_computing + (self._num_leaving if self.sending else 0)

    def fileno(self) -> int:
        return self._stream.fileno()

    def challenge(self) -> None:
        """Sends the first message of the opening. Raises LinkError."""
        self._stream.send([self._challenge])

    def hear(self) -> None:
        self._stream.receive()

    def receive(self) -> list[RowRequest]:
        arrived, self._arrived = self._arrived, []
        return arrived

    def reply(self, request: RowRequest) -> None:
        self._num_computing -= 1
        self._num_leaving = 1 + (self._num_leaving if self.sending else 0)
        buffer = request.buffer
        assert isinstance(buffer, _RowBuffer)
        self._stream.send([request.reply, buffer.memory[: request.header.num_rows * self._rules.row_bytes]])
        if request.header.num_rows <= _SMALL_ROWS and not self.sending:
            self._spare = buffer

    def flush(self) -> None:
        self._stream.flush()

    def pulse(self) -> None:
        # Bytes on their way say as much.
        if not self.sending:
            self._stream.send([PULSE])

    def close(self) -> None:
        self._stream.close()

    def _parse(self) -> Parser:
        answer = bytearray(ANSWER_BYTES)
        yield memoryview(answer)
        self.lane_id, welcome = self._rules.welcome(bytes(answer), challenge=self._challenge, lane=self._lane)
        self._stream.send([welcome])
        encoded = bytearray(HEADER_BYTES)
        while True:
            yield memoryview(encoded)
            header = decode_header(encoded, max_rows=self._rules.max_rows)
            if header.kind is not Kind.REQUEST:
                raise MessageError(f"a router sent a message of kind {header.kind.name}")
            if header.identity.lane != self._lane:
                raise MessageError(f"lane is {header.identity.lane}, this one has number {self._lane}")
            yield from self._parse_request(header, reply_header(bytes(encoded)))

    def _parse_request(self, header: Header, reply: bytes) -> Parser:
        encoded = bytearray(rows_per_expert_bytes(header))
        yield memoryview(encoded)
        rows_per_expert = decode_rows_per_expert(encoded, header)
        reason = self._rules.admit(header, rows_per_expert)
        if reason is not None:
            yield from discard(header.num_rows * self._rules.row_bytes)
            self._stream.send([encode_header(header.refusal(reason))])
            return
        buffer = self._room_for(header.num_rows)
        yield buffer.memory[: header.num_rows * self._rules.row_bytes]
        self._num_computing += 1
        self._arrived.append(
            RowRequest(header=header, rows_per_expert=rows_per_expert, x_RD=buffer.rows, reply=reply, buffer=buffer)
        )

    def _room_for(self, num_rows: int) -> _RowBuffer:
        if num_rows > _SMALL_ROWS:
            return _RowBuffer(num_rows, self._rules)
        buffer, self._spare = self._spare or _RowBuffer(_SMALL_ROWS, self._rules), None
        return buffer
