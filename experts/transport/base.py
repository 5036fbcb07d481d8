"""What a transport offers: the two ends of one (router rank, shard) pair. The logic above knows no sockets.

Both ends are non-blocking and driven by a selector: wait until ``fileno()`` is readable (or writable while
``sending``), then let the end advance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from experts.epoch import ShardAddress
from experts.message import Header, RowsPerExpert
from experts.opening import LaneTerms


class LinkError(ConnectionError):
    """The pair is broken: closed, timed out, or the other end broke the protocol. The text says which."""


@dataclass(slots=True, kw_only=True, eq=False)
class RowRequest:
    """A request that has arrived at the shard. Its results overwrite x_RD, so the reply needs no space."""

    header: Header
    rows_per_expert: RowsPerExpert
    x_RD: torch.Tensor


class Link(Protocol):
    """The router's end of a pair."""

    @property
    def terms(self) -> LaneTerms: ...

    @property
    def sending(self) -> bool:
        """Rows are waiting for the pair to take them."""

    @property
    def broken(self) -> str | None:
        """Why the last ``advance`` found the pair broken; None while it is whole."""

    def fileno(self) -> int: ...

    def submit(
        self,
        header: Header,
        rows_per_expert: Sequence[tuple[int, int]],
        rows: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
    ) -> None:
        """Starts a request; never blocks. rows are sent as they lie one after the other, results filled likewise.

        Both stay untouched by the caller until the answer arrives or the request is abandoned. Raises LinkError.
        """

    def advance(self) -> list[Header]:
        """Moves what can be moved; returns the headers of the replies and refusals completed.

        Does not raise: an answer that arrived just before the pair broke still counts. See ``broken``.
        """

    def abandon(self, header: Header) -> None:
        """Nobody waits for this request any more: its answer will be read and dropped."""

    def close(self) -> None: ...


class Connector(Protocol):
    def __call__(self, address: ShardAddress, *, lane_id: str, secret: bytes, timeout_s: float) -> Link:
        """Connects and opens a lane. Raises LinkError, at the latest after timeout_s."""


class LaneEnd(Protocol):
    """The shard's end of a pair, from the first byte of its opening on."""

    @property
    def lane_id(self) -> str | None:
        """The router's name for the lane; None until it has proved itself."""

    @property
    def sending(self) -> bool: ...

    @property
    def num_unanswered(self) -> int:
        """Requests handed out by ``receive`` whose replies have not left entirely."""

    def fileno(self) -> int: ...

    def receive(self) -> list[RowRequest]:
        """Reads what has arrived, up to a bounded number of bytes; returns the requests completed.

        Requests that the shard does not admit are refused on the way. Raises LinkError when the router is gone
        and MessageError when it is to be refused as a whole.
        """

    def reply(self, request: RowRequest) -> None:
        """Starts to send the results that overwrote the request's rows; never blocks. Raises LinkError."""

    def flush(self) -> None:
        """Sends what the pair takes now. Raises LinkError."""

    def close(self) -> None: ...


class Listener(Protocol):
    """Where routers knock."""

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int: ...

    def fileno(self) -> int: ...

    def accept(self, lane: int) -> LaneEnd | None:
        """The next router's end under this lane number; None when there was none after all.

        Raises OSError when the system cannot give another one.
        """

    def close(self) -> None: ...
