"""What a transport offers: the two ends of one (router rank, shard) pair. The logic above knows no sockets.

Both ends are non-blocking and driven by a poller (waiting.py): it says which end has something to ``hear`` on its
socket and which has news in memory; then the end advances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from experts.epoch import ShardAddress
from experts.message import Header, Refusal, RowsPerExpert
from experts.opening import LaneTerms
from experts.transport.row_views import RowViews


class LinkError(ConnectionError):
    """The pair is broken: closed, timed out, or the other end broke the protocol. The text says which."""


@dataclass(slots=True, eq=False)
class LinkRequest:
    """Rows that a router sends to a shard, and where the results go: bytes, in the same order.

    All stay untouched by the caller until the request is answered or abandoned. header, pairs: as message.py encodes
    them. What stands behind num_rows is the link's: refusal says why the shard would not, abandoned that nobody waits
    for the answer any more, first_row and rows_at where it lies in a region.
    """

    header: bytes
    pairs: bytes | memoryview
    rows: Sequence[memoryview]
    results: Sequence[memoryview]
    num_rows: int
    refusal: Refusal | None = None
    abandoned: bool = False
    first_row: int = 0
    rows_at: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class RowRequest:
    """A request that has arrived at the shard. Its rows are those of x_RD from first_row on; its results overwrite
    them, so the reply needs no space. For the transport that it came by: reply, the encoded header of that, and
    buffer, what the rows lie in."""

    header: Header
    rows_per_expert: RowsPerExpert
    x_RD: torch.Tensor | RowViews
    first_row: int = 0
    reply: bytes = b""
    buffer: object = None


class Pollable(Protocol):
    """What a poller waits for: a socket, and for an ``InMemory`` end also the memory beside it."""

    def fileno(self) -> int: ...


class Lines(NamedTuple):
    """Addresses of single bytes: the other end's count, this end's count of what it took, and its word that it sleeps.
    There are news while the first two differ."""

    published: int
    taken: int
    asleep: int


@runtime_checkable
class InMemory(Protocol):
    """An end whose news may lie in memory; waiting.py tells how these serve a wait."""

    def fileno(self) -> int: ...

    def has_news(self) -> bool:
        """Whether the other end has published something that was not taken yet. Cheap."""

    def lines(self) -> Lines | None:
        """Where that can be seen in memory; None while it cannot. Valid until the end is closed."""

    def fall_asleep(self) -> None:
        """From now on the other end rings at the socket whenever it publishes."""

    def wake_up(self) -> None:
        """No more ringing; the inverse of fall_asleep."""


class Link(Pollable, Protocol):
    """The router's end of a pair."""

    @property
    def transport(self) -> str:
        """Its name in transport/select.py."""

    @property
    def terms(self) -> LaneTerms: ...

    @property
    def sending(self) -> bool:
        """Rows are waiting for the pair to take them."""

    @property
    def wants_to_write(self) -> bool:
        """``sending``, and what it waits for is room in the socket."""

    @property
    def broken(self) -> str | None:
        """Why the pair is found broken; None while it is whole."""

    @property
    def progress(self) -> int:
        """Changes with every sign that the shard, or the way to it, is at work. Without meaning but that."""

    def submit(self, request: LinkRequest) -> None:
        """Starts a request; never blocks. Raises LinkError."""

    def hear(self) -> None:
        """Reads what is on the socket. Does not raise: see ``broken``."""

    def advance(self) -> list[LinkRequest]:
        """Moves what can be moved; returns the requests that have been answered or refused.

        Does not raise: an answer that arrived just before the pair broke still counts. See ``broken``.
        """

    def abandon(self, request: LinkRequest) -> None:
        """Nobody waits for this request any more: its answer will be read and dropped."""

    def close(self) -> None: ...


class Connector(Protocol):
    def __call__(self, address: ShardAddress, *, lane_id: str, secret: bytes, timeout_s: float) -> Link:
        """Connects and opens a lane. Raises LinkError, at the latest after timeout_s."""


class LaneEnd(Pollable, Protocol):
    """The shard's end of a pair, from the first byte of its opening on."""

    @property
    def transport(self) -> str: ...

    @property
    def lane_id(self) -> str | None:
        """The router's name for the lane; None until it has proved itself."""

    @property
    def sending(self) -> bool: ...

    @property
    def num_unanswered(self) -> int:
        """Requests handed out by ``receive`` whose replies have not left entirely."""

    def hear(self) -> None:
        """Reads what is on the socket. Raises LinkError when the router is gone and MessageError when it is to be
        refused as a whole."""

    def receive(self) -> list[RowRequest]:
        """The requests that have arrived whole, a bounded number of bytes at a time. Requests that the shard does
        not admit are refused on the way. Raises as ``hear`` does."""

    def reply(self, request: RowRequest) -> None:
        """Starts to send the results that overwrote the request's rows; never blocks. Raises LinkError."""

    def flush(self) -> None:
        """Sends what the pair takes now. Raises LinkError."""

    def pulse(self) -> None:
        """Lets the router know that what it waits for is being worked on; never blocks. Raises LinkError."""

    def close(self) -> None: ...


class Listener(Pollable, Protocol):
    """Where routers knock."""

    def accept(self, lane: int) -> LaneEnd | None:
        """The next router's end under this lane number; None when there was none after all.

        Raises OSError when the system cannot give another one.
        """

    def close(self) -> None: ...
