"""The shard's end of a lane through memory that it shares with a router on the same host.

Headers and pairs are copied out of the region before they are looked at: a router that changes them meanwhile
changes nothing. Rows are computed where they lie: whatever a router does to them, they are numbers, and its own.
"""

from __future__ import annotations

import contextlib
import socket

import torch

from experts.message import (
    HEADER_BYTES,
    Header,
    Kind,
    MessageError,
    decode_header,
    decode_rows_per_expert,
    encode_header,
    reply_header,
    rows_per_expert_bytes,
)
from experts.transport.base import Lines, LinkError, RowRequest
from experts.transport.row_views import RowViews
from experts.transport.rules import LaneRules
from experts.transport.shm_offer import abstract, new_socket_name
from experts.transport.shm_opening import Shared, ShmOpening
from experts.transport.shm_port import Port
from experts.transport.shm_region import ENTRY_BYTES, FIRST_ROW, REPLY_ENTRIES, REQUEST_ENTRIES, ROWS

_BACKLOG = 128


class ShmListener:
    """Listens on a Unix socket without a file. Raises OSError if it cannot."""

    def __init__(self, rules: LaneRules) -> None:
        self._rules = rules
        self.unix_name = new_socket_name()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(abstract(self.unix_name))
        self._socket.listen(_BACKLOG)
        self._socket.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self, lane: int) -> ShmLane | None:
        """None when nobody was there after all. Raises OSError when the system cannot give another socket."""
        try:
            sock, _peer = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        accepted = ShmLane(sock, lane, self._rules)
        try:
            accepted.challenge()
        except LinkError:
            # Gone before it said a word.
            accepted.close()
            return None
        return accepted

    def close(self) -> None:
        self._socket.close()


class ShmLane:
    """One router's lane, from the challenge on. Made by ``ShmListener.accept``."""

    transport = "shm"
    # A reply has its place in the region before its request was sent.
    sending = False

    def __init__(self, sock: socket.socket, lane: int, rules: LaneRules) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._lane = lane
        self._rules = rules
        self._opening = ShmOpening(sock, lane, rules)
        self._region: _LaneRegion | None = None

    @property
    def lane_id(self) -> str | None:
        return self._opening.lane_id if self._region is not None else None

    @property
    def num_unanswered(self) -> int:
        return 0 if self._region is None else self._region.num_unanswered

    def fileno(self) -> int:
        return self._socket.fileno()

    def challenge(self) -> None:
        """Sends the first message of the opening. Raises LinkError."""
        self._opening.challenge()

    def has_news(self) -> bool:
        return self._region is not None and self._region.port.has_news()

    def lines(self) -> Lines | None:
        return None if self._region is None else self._region.port.lines()

    def fall_asleep(self) -> None:
        if self._region is not None:
            self._region.port.fall_asleep()

    def wake_up(self) -> None:
        if self._region is not None:
            self._region.port.wake_up()

    def hear(self) -> None:
        if self._region is not None:
            self._region.port.hear()
            if self._region.port.closed is not None:
                raise LinkError(self._region.port.closed)
        elif (shared := self._opening.hear()) is not None:
            self._region = _LaneRegion(shared, self._socket, self._lane, self._rules)

    def receive(self) -> list[RowRequest]:
        return [] if self._region is None else self._region.receive()

    def reply(self, request: RowRequest) -> None:
        assert self._region is not None
        self._region.reply(request)

    def flush(self) -> None:
        """Nothing waits to be sent."""

    def pulse(self) -> None:
        if self._region is not None:
            self._region.port.pulse()

    def close(self) -> None:
        """The map goes with the last of the rows that are still being computed."""
        self._opening.close()
        if self._region is not None:
            self._region.close()
            self._region = None
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class _LaneRegion:
    """The region of an open lane."""

    def __init__(self, shared: Shared, sock: socket.socket, lane: int, rules: LaneRules) -> None:
        self.num_unanswered = 0
        self._lane = lane
        self._rules = rules
        self._shape = shared.shape
        self._memory = memoryview(shared.map)
        num_values = shared.shape.num_rows * rules.hidden_size
        rows = torch.frombuffer(shared.map, dtype=rules.dtype, count=num_values, offset=ROWS)
        self._rows_RD = RowViews(rows.view(shared.shape.num_rows, rules.hidden_size))
        self.port = Port(self._memory, sock, shared.announcing, is_router=False)

    def receive(self) -> list[RowRequest]:
        requests: list[RowRequest] = []
        for _ in range(self.port.num_news()):
            request = self._take()
            if request is not None:
                requests.append(request)
        return requests

    def reply(self, request: RowRequest) -> None:
        self.num_unanswered -= 1
        self._answer(request.reply)

    def close(self) -> None:
        self._memory.release()
        del self._rows_RD

    def _take(self) -> RowRequest | None:
        """The next request, None if it was refused. Raises MessageError, LinkError."""
        offset = REQUEST_ENTRIES + self.port.take() * ENTRY_BYTES
        entry = bytes(self._memory[offset : offset + ENTRY_BYTES])
        header = self._check(entry[:HEADER_BYTES])
        [first_row] = FIRST_ROW.unpack_from(entry, HEADER_BYTES)
        pairs_bytes = rows_per_expert_bytes(header)
        start = first_row + self._shape.head_rows(pairs_bytes)
        stop = start + header.num_rows
        if stop > self._shape.num_rows:
            raise MessageError(f"rows {first_row} to {stop} do not lie in a region of {self._shape.num_rows}")
        offset = self._shape.offset(first_row)
        rows_per_expert = decode_rows_per_expert(bytes(self._memory[offset : offset + pairs_bytes]), header)
        reason = self._rules.admit(header, rows_per_expert)
        if reason is not None:
            self._answer(encode_header(header.refusal(reason)))
            return None
        self.num_unanswered += 1
        return RowRequest(
            header=header,
            rows_per_expert=rows_per_expert,
            x_RD=self._rows_RD,
            first_row=start,
            reply=reply_header(entry),
        )

    def _check(self, encoded: bytes) -> Header:
        header = decode_header(encoded, max_rows=self._rules.max_rows)
        if header.kind is not Kind.REQUEST:
            raise MessageError(f"a router sent a message of kind {header.kind.name}")
        if header.identity.lane != self._lane:
            raise MessageError(f"lane is {header.identity.lane}, this one has number {self._lane}")
        return header

    def _answer(self, header: bytes) -> None:
        offset = REPLY_ENTRIES + self.port.next_entry * ENTRY_BYTES
        self._memory[offset : offset + HEADER_BYTES] = header
        self.port.publish()
