"""What a gateway says on the token path after its welcome: aborts, taken out of the bytes as they come."""

from __future__ import annotations

from router.messages import Abort, decode_abort
from router.token_opening import LENGTH, MAX_ABORT_BYTES


class AbortReader:
    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, data: bytes) -> list[Abort]:
        """The aborts that these bytes complete. Never holds more than one incomplete abort.

        Raises ValueError for what is no abort; what follows it cannot be understood either.
        """
        self._received += data
        aborts = []
        begin = 0
        while (end := self._end_of_abort(begin)) is not None:
            aborts.append(decode_abort(bytes(self._received[begin + LENGTH.size : end])))
            begin = end
        del self._received[:begin]
        return aborts

    def _end_of_abort(self, begin: int) -> int | None:
        """None while some of it is missing."""
        if len(self._received) < begin + LENGTH.size:
            return None
        (num_bytes,) = LENGTH.unpack_from(self._received, begin)
        if num_bytes > MAX_ABORT_BYTES:
            raise ValueError(f"an abort of {num_bytes} bytes, the limit is {MAX_ABORT_BYTES}")
        end = begin + LENGTH.size + num_bytes
        return None if len(self._received) < end else end
