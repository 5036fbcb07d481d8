"""Ends of a shm lane that need not keep to the protocol: plain sockets, a plain map, and the bytes of messages."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import socket
import threading
import time
from collections.abc import Callable
from mmap import mmap
from types import TracebackType
from typing import Self

from raw_ends import prove_as_router, prove_as_shard, read

from experts import message, opening
from experts.epoch import ShardAddress
from experts.message import Header
from experts.placement import ShardId
from experts.transport.host_id import host_id
from experts.transport.shm_offer import (
    OFFER_BYTES,
    READY,
    abstract,
    decode_offer,
    encode_offer,
    new_socket_name,
    region_shape,
)
from experts.transport.shm_port import Announcing
from experts.transport.shm_region import (
    ENTRY_BYTES,
    FIRST_ROW,
    NUM_ENTRIES,
    REPLY_ENTRIES,
    REPLY_LINE,
    REQUEST_ENTRIES,
    REQUEST_LINE,
    RegionShape,
)

ALL_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
REGION_NAME = "memfd:arriero-lane"


def num_regions_mapped() -> int:
    """In this process, without those that only unreachable cycles still hold."""
    gc.collect()
    with open("/proc/self/maps") as maps:
        return sum(REGION_NAME in line for line in maps)


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def memfd(num_bytes: int, seals: int = ALL_SEALS, name: str = "arriero-lane") -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def knock_unix(unix_name: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(10)
    sock.connect(abstract(unix_name))
    return sock


class _RawEnd:
    """One end of an open lane. The socket is blocking, with a timeout."""

    def __init__(self, sock: socket.socket, region: mmap, shape: RegionShape, my_line: int, their_line: int) -> None:
        self.sock = sock
        self.map = region
        self.shape = shape
        self._my_line = my_line
        self._their_line = their_line
        self._num_published = 0
        self._num_seen = 0

    def publish(self, count: int = 1) -> None:
        """And rings, whether the other end sleeps or not, if it is still there: it may have seen it without."""
        self._num_published += count
        self.map[self._my_line] = self._num_published & 0xFF
        with contextlib.suppress(BrokenPipeError):
            self.sock.send(b"\1")

    def wait_for_message(self, timeout_s: float = 10.0) -> int:
        """The number of the entry that has been published."""
        deadline = time.monotonic() + timeout_s
        while self.map[self._their_line] == self._num_seen & 0xFF:
            assert time.monotonic() < deadline, "nothing was published"
            time.sleep(0.0005)
        self._num_seen += 1
        return (self._num_seen - 1) % NUM_ENTRIES

    def close(self) -> None:
        self.sock.close()
        self.map.close()


class RawRouter(_RawEnd):
    """An open lane to a shard: writes what it likes into the region."""

    def __init__(self, sock: socket.socket, lane: int, region: mmap, shape: RegionShape) -> None:
        super().__init__(sock, region, shape, REQUEST_LINE, REPLY_LINE)
        self.lane = lane

    def write_entry(self, header: bytes, *, first_row: int = 0) -> None:
        """Into the next entry, without publishing it."""
        at = REQUEST_ENTRIES + self._num_published % NUM_ENTRIES * ENTRY_BYTES
        self.map[at : at + len(header)] = header
        self.map[at + message.HEADER_BYTES : at + message.HEADER_BYTES + FIRST_ROW.size] = FIRST_ROW.pack(first_row)

    def write_rows(self, encoded: bytes, *, first_row: int = 0) -> None:
        """Pairs, padding and rows, as they lie in the region."""
        at = self.shape.offset(first_row)
        self.map[at : at + len(encoded)] = encoded

    def read_answer(self) -> bytes:
        at = REPLY_ENTRIES + self.wait_for_message() * ENTRY_BYTES
        return self.map[at : at + message.HEADER_BYTES]


def open_shm_lane(
    unix_name: str, *, secret: bytes, shard_id: str, max_rows: int, row_bytes: int, lane_id: str = "raw"
) -> RawRouter:
    sock = knock_unix(unix_name)
    lane = prove_as_router(sock, secret=secret, shard_id=shard_id, lane_id=lane_id)
    shape = region_shape(max_rows=max_rows, row_bytes=row_bytes)
    fd = memfd(shape.num_bytes)
    socket.send_fds(sock, [encode_offer(shape, Announcing.MEMORY)], [fd])
    region = mmap(fd, shape.num_bytes)
    os.close(fd)
    assert read(sock, len(READY)) == READY
    return RawRouter(sock, lane, region, shape)


class RawShard(_RawEnd):
    """What a FakeShmShard's ``act`` gets."""

    def __init__(self, sock: socket.socket, region: mmap, shape: RegionShape) -> None:
        super().__init__(sock, region, shape, REPLY_LINE, REQUEST_LINE)

    def read_request(self) -> tuple[Header, int, bytes]:
        """Header, offset of its rows and the rows themselves."""
        at = REQUEST_ENTRIES + self.wait_for_message() * ENTRY_BYTES
        entry = self.map[at : at + ENTRY_BYTES]
        header = message.decode_header(entry[: message.HEADER_BYTES], max_rows=1 << 20)
        [first_row] = FIRST_ROW.unpack_from(entry, message.HEADER_BYTES)
        at = self.shape.offset(first_row + self.shape.head_rows(message.rows_per_expert_bytes(header)))
        return header, at, self.map[at : at + header.num_rows * self.shape.row_bytes]

    def answer(self, header: bytes) -> None:
        at = REPLY_ENTRIES + self._num_published % NUM_ENTRIES * ENTRY_BYTES
        self.map[at : at + len(header)] = header
        self.publish()


class FakeShmShard:
    """Accepts one router, opens the lane and maps its region, and then does what ``act`` says, in a thread."""

    def __init__(self, act: Callable[[RawShard], None], *, shard_id: str, secret: bytes, hidden_size: int) -> None:
        self._act = act
        self._shard_id = shard_id
        self._secret = secret
        self._terms = opening.LaneTerms(lane=1, hidden_size=hidden_size, dtype="float32", max_rows=1 << 16)
        name = new_socket_name()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(abstract(name))
        self._listener.listen(1)
        self.address = ShardAddress(
            shard_id=ShardId(shard_id), node_id="here", host="127.0.0.1", port=1, host_id=host_id(), unix_name=name
        )
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        sock, _peer = self._listener.accept()
        prove_as_shard(sock, self._terms, secret=self._secret, shard_id=self._shard_id)
        offer, descriptors, _flags, _address = socket.recv_fds(sock, OFFER_BYTES, 1)
        largest = region_shape(max_rows=self._terms.max_rows, row_bytes=self._terms.hidden_size * 4)
        shape, _announcing = decode_offer(offer, largest=largest)
        [fd] = descriptors
        end = RawShard(sock, mmap(fd, shape.num_bytes), shape)
        os.close(fd)
        sock.send(READY)
        try:
            self._act(end)
        finally:
            end.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
