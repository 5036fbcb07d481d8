"""One end's half of the talk about a region: it publishes entries, takes the other end's, and rings the socket.

Each end writes one line of the region and reads the other's: a count of what it has published, modulo 256, whether
it sleeps, and a pulse that shows it at work. All are single bytes, which no machine tears.

Entries are used in turns, and of 64 requests at most under way neither end can overtake the other: a request's entry
was read long before the request is answered, and an answer's entry is used again only after the router has read it
and asked once more.
"""

from __future__ import annotations

import ctypes
import socket
from enum import IntEnum

from experts.message import MessageError
from experts.transport.base import Lines, LinkError
from experts.transport.memory_order import FullBarrier
from experts.transport.shm_region import NUM_ENTRIES, REPLY_LINE, REQUEST_LINE

_COUNT = 0
_ASLEEP = 1
_PULSE = 2
_HEAR_BYTES = 4096
_RING = b"\1"


class Announcing(IntEnum):
    """How an end learns what was published: the router decides, by the machine (memory_order.py).

    MEMORY: it looks at the count; the socket wakes it up. SOCKET: one byte on the socket each; nothing else counts.
    """

    MEMORY = 1
    SOCKET = 2


class Port:
    """closed: the other end is gone; what it had published can still be taken."""

    def __init__(self, memory: memoryview, sock: socket.socket, announcing: Announcing, *, is_router: bool) -> None:
        """The socket is non-blocking and stays the caller's."""
        self.closed: str | None = None
        self._memory = memory
        self._socket = sock
        self._looks = announcing is Announcing.MEMORY
        self._my_line, self._their_line = (REQUEST_LINE, REPLY_LINE) if is_router else (REPLY_LINE, REQUEST_LINE)
        self._barrier = FullBarrier()
        self._num_published = 0
        self._num_taken = 0
        self._num_rings = 0
        # The low byte of _num_taken, at a place of its own: compiled code looks at it.
        self._taken = (ctypes.c_ubyte * 1)()
        self._memory_at = ctypes.addressof(ctypes.c_ubyte.from_buffer(memory))

    def lines(self) -> Lines | None:
        """None where nothing can be concluded from memory."""
        if not self._looks:
            return None
        return Lines(
            published=self._memory_at + self._their_line + _COUNT,
            taken=ctypes.addressof(self._taken),
            asleep=self._memory_at + self._my_line + _ASLEEP,
        )

    @property
    def next_entry(self) -> int:
        """Which entry to write before the next ``publish``."""
        return self._num_published % NUM_ENTRIES

    def publish(self) -> None:
        """What was written so far is there for the other end. Raises LinkError."""
        self._num_published += 1
        self._memory[self._my_line + _COUNT] = self._num_published & 0xFF
        if self._looks:
            self._barrier()
            if not self._memory[self._their_line + _ASLEEP]:
                return
        self._ring()

    def has_news(self) -> bool:
        return self._looks and self._memory[self._their_line + _COUNT] != self._num_taken & 0xFF

    def pulse(self) -> None:
        """Wakes nobody."""
        line = self._my_line
        self._memory[line + _PULSE] = (self._memory[line + _PULSE] + 1) & 0xFF

    @property
    def progress(self) -> int:
        """Changes with each entry taken, ring heard, and pulse of the other end."""
        return ((self._num_taken + self._num_rings) << 8) | self._memory[self._their_line + _PULSE]

    def fall_asleep(self) -> None:
        self._memory[self._my_line + _ASLEEP] = 1

    def wake_up(self) -> None:
        self._memory[self._my_line + _ASLEEP] = 0

    def num_news(self) -> int:
        """How many entries may be taken. Raises MessageError when there are more than exist."""
        if self._looks:
            count = (self._memory[self._their_line + _COUNT] - self._num_taken) & 0xFF
        else:
            count = self._num_rings - self._num_taken
        if count > NUM_ENTRIES:
            raise MessageError(f"{count} messages are announced at once, there are {NUM_ENTRIES} entries")
        return count

    def take(self) -> int:
        """The next entry; read it before anything else is published."""
        entry = self._num_taken % NUM_ENTRIES
        self._num_taken += 1
        self._taken[0] = self._num_taken & 0xFF
        return entry

    def hear(self) -> None:
        """Reads what is on the socket; see ``closed``."""
        try:
            count = len(self._socket.recv(_HEAR_BYTES))
            if count == 0:
                self.closed = "closed by the other end"
            self._num_rings += count
        except BlockingIOError:
            return
        except OSError as error:
            self.closed = f"receiving failed: {error}"

    def _ring(self) -> None:
        try:
            self._socket.send(_RING)
        except BlockingIOError as error:
            # Rings that nobody has read yet wake up as well as this one would; where they are counted none may go.
            if not self._looks:
                raise LinkError("sending failed: the other end does not listen") from error
        except OSError as error:
            raise LinkError(f"sending failed: {error}") from error
