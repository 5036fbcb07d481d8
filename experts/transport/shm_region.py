"""The memory between a router and a shard on one host, as both see it.

       0  requests published (router writes), router asleep (router writes)
      64  replies published (shard writes), shard asleep (shard writes)
    4096  64 request entries of 64 bytes, used in turns: header, number of the first row
    8192  64 reply entries of 64 bytes, used in turns: header
   12288  rows; the router decides what lies where. A request is

          | its (expert, rows) pairs, padded to whole rows | its rows, which the results overwrite |

It is a memfd: it has no name, so nothing is left when both processes are gone, and it is not bound by the size of
/dev/shm. Its size is sealed, so neither end can take pages away from under the other (SIGBUS). It is as large as the
largest request asks for, but only address space: pages come as they are needed, and go again.
"""

from __future__ import annotations

import fcntl
import os
import struct
from dataclasses import dataclass
from mmap import MADV_REMOVE, PAGESIZE, mmap

from experts.message import MessageError

# Behind the header of a request entry.
FIRST_ROW = struct.Struct("<I")
NUM_ENTRIES = 64
ENTRY_BYTES = 64
REQUEST_LINE = 0
REPLY_LINE = 64
REQUEST_ENTRIES = 4096
REPLY_ENTRIES = REQUEST_ENTRIES + NUM_ENTRIES * ENTRY_BYTES
ROWS = REPLY_ENTRIES + NUM_ENTRIES * ENTRY_BYTES

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# Pages are asked for in steps of this size, so that growing is rare.
_STEP_BYTES = 1 << 18
# What an idle lane keeps: enough for the steps of a busy decode and for a chunk of a prefill.
_KEEP_BYTES = 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionShape:
    row_bytes: int
    num_rows: int

    @property
    def num_bytes(self) -> int:
        return ROWS + self.num_rows * self.row_bytes

    def head_rows(self, pairs_bytes: int) -> int:
        """How many rows the pairs of a request take."""
        return -(-pairs_bytes // self.row_bytes)

    def offset(self, row: int) -> int:
        return ROWS + row * self.row_bytes


class Region:
    """The router's hold on a region: makes it, and has pages for the rows that are in use."""

    def __init__(self, shape: RegionShape, *, keep_bytes: int = _KEEP_BYTES) -> None:
        """keep_bytes: what is kept of it while no row is in use. Raises OSError."""
        self.shape = shape
        self._keep_bytes = -(-keep_bytes // PAGESIZE) * PAGESIZE
        self._backed_bytes = 0
        self.fd = os.memfd_create("arriero-lane", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, shape.num_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self.back(0)
            self.map = mmap(self.fd, shape.num_bytes)
        except BaseException:
            os.close(self.fd)
            raise

    def back(self, stop_row: int) -> None:
        """Pages for all rows below stop_row: a lack of memory is an error here, and would be a SIGBUS later.

        Raises OSError.
        """
        wanted = self.shape.offset(stop_row)
        if wanted > self._backed_bytes:
            wanted = min(-(-wanted // _STEP_BYTES) * _STEP_BYTES, self.shape.num_bytes)
            os.posix_fallocate(self.fd, self._backed_bytes, wanted - self._backed_bytes)
            self._backed_bytes = wanted

    def trim(self) -> None:
        """Gives pages back. Only while no row is in use."""
        if self._backed_bytes > self._keep_bytes:
            self.map.madvise(MADV_REMOVE, self._keep_bytes, self._backed_bytes - self._keep_bytes)
            self._backed_bytes = self._keep_bytes

    def close(self) -> None:
        """Idempotent. Views of the map must have been released."""
        if not self.map.closed:
            self.map.close()
            os.close(self.fd)


def map_region(fd: int, shape: RegionShape) -> mmap:
    """The region of another process, which is not trusted. Raises MessageError if it is not what it should be."""
    try:
        seals, num_bytes = fcntl.fcntl(fd, fcntl.F_GET_SEALS), os.fstat(fd).st_size
        mapped = mmap(fd, shape.num_bytes)
    except (OSError, ValueError) as error:
        raise MessageError(f"the region cannot be mapped: {error}") from error
    if seals & _SEALS != _SEALS or num_bytes != shape.num_bytes:
        mapped.close()
        raise MessageError(
            f"the region has {num_bytes} bytes and seals {seals:#x}, not {shape.num_bytes} and {_SEALS:#x}"
        )
    return mapped
