"""The router's end of a lane through memory that it shares with a shard on the same host.

The opening is that of every lane, over the shard's Unix socket; then the router makes the region (shm_region.py)
and passes it along. It alone decides what lies where, and believes nothing of what it reads there but that an
answer equals, byte for byte, the one it waits for.

Rows are copied into the region and results out of it: what a retry sends to a copy are the router's own rows, which
no shard can touch. A link that is given up takes its region with it: a shard that wakes up later writes into pages
that nobody looks at any more.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Sequence

import torch

from experts.epoch import ShardAddress
from experts.message import HEADER_BYTES, MessageError
from experts.opening import LaneTerms, OpeningError
from experts.transport.base import Lines, LinkError, LinkRequest
from experts.transport.exact_read import read_exactly
from experts.transport.memory_order import memory_keeps_order
from experts.transport.router_opening import open_lane
from experts.transport.row_space import RowSpace
from experts.transport.shm_offer import READY, abstract, encode_offer, region_shape
from experts.transport.shm_port import Announcing, Port
from experts.transport.shm_region import ENTRY_BYTES, FIRST_ROW, NUM_ENTRIES, REPLY_ENTRIES, REQUEST_ENTRIES, Region
from experts.transport.under_way import UnderWay


def connect(
    address: ShardAddress, *, lane_id: str, secret: bytes, timeout_s: float, announcing: Announcing | None = None
) -> ShmLink:
    """Connects, opens a lane and shares a region: blocking, but no longer than timeout_s. Raises LinkError.

    announcing: None is what suits the machine.
    """
    deadline = time.monotonic() + timeout_s
    sock = _connect(address, timeout_s)
    try:
        terms = open_lane(sock, address, lane_id=lane_id, secret=secret, deadline=deadline)
        return _share(sock, terms, announcing or _announcing(), deadline)
    except (OSError, OpeningError) as error:
        sock.close()
        raise LinkError(f"phase opening: {error}") from error


def _connect(address: ShardAddress, timeout_s: float) -> socket.socket:
    if address.unix_name is None:
        raise LinkError("phase connect: the shard does not offer shm")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(abstract(address.unix_name))
    except OSError as error:
        sock.close()
        raise LinkError(f"phase connect: {error}") from error
    return sock


def _announcing() -> Announcing:
    return Announcing.MEMORY if memory_keeps_order() else Announcing.SOCKET


def _share(sock: socket.socket, terms: LaneTerms, announcing: Announcing, deadline: float) -> ShmLink:
    """Raises OSError."""
    row_bytes = terms.hidden_size * getattr(torch, terms.dtype).itemsize
    region = Region(region_shape(max_rows=terms.max_rows, row_bytes=row_bytes))
    try:
        socket.send_fds(sock, [encode_offer(region.shape, announcing)], [region.fd])
        if read_exactly(sock, len(READY), deadline) != READY:
            raise OpeningError("the shard does not take the region")
        return ShmLink(sock, terms, region, announcing)
    except BaseException:
        region.close()
        raise


class ShmLink:
    """Made by ``connect``. Once broken only ``close`` is of use."""

    transport = "shm"
    # It waits for room in the region, which answers make; the socket takes what little it gets.
    wants_to_write = False

    def __init__(self, sock: socket.socket, terms: LaneTerms, region: Region, announcing: Announcing) -> None:
        """Takes over both. The region must be mapped by the shard."""
        sock.setblocking(False)
        self.terms = terms
        self.broken: str | None = None
        self._socket = sock
        self._region = region
        self._memory = memoryview(region.map)
        self._port = Port(self._memory, sock, announcing, is_router=True)
        self._space = RowSpace(region.shape.num_rows)
        self._under_way = UnderWay(terms.max_rows)
        self._waiting: deque[LinkRequest] = deque()

    @property
    def sending(self) -> bool:
        return bool(self._waiting)

    @property
    def progress(self) -> int:
        return self._port.progress

    def fileno(self) -> int:
        return self._socket.fileno()

    def submit(self, request: LinkRequest) -> None:
        if self._waiting or not self._lay_down(request):
            self._waiting.append(request)

    def hear(self) -> None:
        self._port.hear()

    def has_news(self) -> bool:
        return self._port.has_news()

    def lines(self) -> Lines | None:
        return self._port.lines()

    def fall_asleep(self) -> None:
        self._port.fall_asleep()

    def wake_up(self) -> None:
        self._port.wake_up()

    def advance(self) -> list[LinkRequest]:
        answered: list[LinkRequest] = []
        try:
            for _ in range(self._port.num_news()):
                request = self._take_answer()
                if request is not None:
                    answered.append(request)
            while self._waiting and self._lay_down(self._waiting[0]):
                self._waiting.popleft()
        except MessageError as error:
            self.broken = f"broke the protocol: {error}"
        except LinkError as error:
            self.broken = str(error)
        self.broken = self.broken or self._port.closed
        return answered

    def abandon(self, request: LinkRequest) -> None:
        request.abandoned = True
        if request in self._waiting:
            self._waiting.remove(request)

    def close(self) -> None:
        """Idempotent."""
        self._waiting.clear()
        self._memory.release()
        self._region.close()
        self._socket.close()

    def _lay_down(self, request: LinkRequest) -> bool:
        """Whether there was room. Raises LinkError."""
        shape = self._region.shape
        head_rows = shape.head_rows(len(request.pairs))
        first_row = self._make_room(head_rows + request.num_rows)
        if first_row is None:
            return False
        request.first_row, request.rows_at = first_row, shape.offset(first_row + head_rows)
        self._write(shape.offset(first_row), request.pairs)
        self._write(request.rows_at, *request.rows)
        entry = REQUEST_ENTRIES + self._port.next_entry * ENTRY_BYTES
        self._write(entry, request.header, FIRST_ROW.pack(first_row))
        self._under_way.add(request)
        self._port.publish()
        return True

    def _make_room(self, num_rows: int) -> int | None:
        first_row = self._space.take(num_rows) if len(self._under_way) < NUM_ENTRIES else None
        if first_row is not None:
            try:
                self._region.back(first_row + num_rows)
            except OSError as error:
                raise LinkError(f"no memory for {num_rows} more rows: {error}") from error
        return first_row

    def _write(self, offset: int, *parts: memoryview | bytes) -> None:
        memory = self._memory
        for part in parts:
            end = offset + len(part)
            memory[offset:end] = part
            offset = end

    def _take_answer(self) -> LinkRequest | None:
        entry = REPLY_ENTRIES + self._port.take() * ENTRY_BYTES
        answer = bytes(self._memory[entry : entry + HEADER_BYTES])
        request = self._under_way.pop(answer)
        if request is None:
            request = self._under_way.take_out(self._under_way.judge(answer), answer)
        if request is None:
            # The reply to an attempt that was never made.
            return None
        if request.refusal is None and not request.abandoned:
            self._read(request.rows_at, request.results)
        self._space.give_back(request.first_row)
        if not self._space.end:
            self._region.trim()
        return None if request.abandoned else request

    def _read(self, offset: int, parts: Sequence[memoryview]) -> None:
        for part in parts:
            end = offset + len(part)
            part[:] = self._memory[offset:end]
            offset = end
