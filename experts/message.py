"""What travels on a lane: a fixed little-endian header, rows per expert, rows. Bytes only; nothing is unpickled.

    request   header | (expert, rows) x num_slots | rows        router -> shard
    reply     header | rows                                     shard -> router, same rows, same order
    refusal   header                                            shard -> router, reason set
    pulse     48 bytes, always the same                         shard -> router, not an answer: it is at work

Reply and refusal carry the request's own header; only kind and reason differ. Every field is checked before
anything of the announced size is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum
from itertools import chain
from types import MappingProxyType
from typing import NamedTuple

_HEADER = struct.Struct("<4sBBHQQIQIHHI")
_ROWS_OF_EXPERT = struct.Struct("<II")
_MAGIC = b"ARL1"
# Kind and reason of a reply: the two bytes behind the magic.
_REPLY_WITHOUT_REASON = b"\x02\x00"

HEADER_BYTES = _HEADER.size
# Has no rows, as no answer has: it can be mistaken for none.
PULSE = _HEADER.pack(_MAGIC, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
PAIR_BYTES = _ROWS_OF_EXPERT.size
RowsPerExpert = tuple[tuple[int, int], ...]


class MessageError(ValueError):
    """The bytes are no message of this protocol. The stream they came from cannot be trusted any further."""


class Kind(IntEnum):
    REQUEST = 1
    REPLY = 2
    REFUSAL = 3


_KINDS: Mapping[int, Kind] = MappingProxyType({kind.value: kind for kind in Kind})


class Refusal(IntEnum):
    """Why a shard will not compute a well-formed request. 0 on the wire means no refusal."""

    STALE_EPOCH = 1
    OTHER_WEIGHTS_VERSION = 2
    NO_SUCH_SLOT = 3


class Identity(NamedTuple):
    """What tells one request of a lane from every other, and from its own earlier attempts."""

    epoch: int
    weights_version: int
    lane: int
    step: int
    layer: int
    micro_batch: int
    attempt: int


class Header(NamedTuple):
    """num_slots experts get num_rows rows in all. reason is set in a refusal and only there."""

    kind: Kind
    identity: Identity
    num_slots: int
    num_rows: int
    reason: Refusal | None = None

    def reply(self) -> Header:
        return self._replace(kind=Kind.REPLY)

    def refusal(self, reason: Refusal) -> Header:
        return self._replace(kind=Kind.REFUSAL, reason=reason)


def request_header(identity: Identity, rows_per_expert: Sequence[tuple[int, int]]) -> Header:
    num_rows = sum(rows for _expert, rows in rows_per_expert)
    return Header(kind=Kind.REQUEST, identity=identity, num_slots=len(rows_per_expert), num_rows=num_rows)


def encode_request_header(identity: Identity, *, num_slots: int, num_rows: int) -> bytes:
    return _HEADER.pack(_MAGIC, Kind.REQUEST, 0, num_slots, *identity, num_rows)


def reply_header(request: bytes) -> bytes:
    """The encoded header of the reply to a request, of whose encoding only the header counts.

    Whoever keeps it can tell by comparing bytes that an answer fits the request in every field.
    """
    return request[:4] + _REPLY_WITHOUT_REASON + request[6:HEADER_BYTES]


def encode_header(header: Header) -> bytes:
    who = header.identity
    return _HEADER.pack(
        _MAGIC,
        header.kind,
        header.reason or 0,
        header.num_slots,
        who.epoch,
        who.weights_version,
        who.lane,
        who.step,
        who.layer,
        who.micro_batch,
        who.attempt,
        header.num_rows,
    )


def decode_header(encoded: bytes | bytearray | memoryview, *, max_rows: int) -> Header:
    """Raises MessageError naming the field that is out of bounds."""
    fields = _HEADER.unpack(encoded)
    magic, kind, reason, num_slots = fields[:4]
    num_rows = fields[11]
    if magic != _MAGIC:
        raise MessageError(f"magic is {magic!r}, not {_MAGIC!r}")
    if not 1 <= num_rows <= max_rows:
        raise MessageError(f"num_rows is {num_rows}, must be between 1 and {max_rows}")
    if not 1 <= num_slots <= num_rows:
        raise MessageError(f"num_slots is {num_slots}, must be between 1 and num_rows ({num_rows})")
    if kind not in _KINDS:
        raise MessageError(f"kind is {kind}")
    return Header(_KINDS[kind], Identity._make(fields[4:11]), num_slots, num_rows, _reason(kind, reason))


def _reason(kind: int, reason: int) -> Refusal | None:
    if reason == 0 and kind != Kind.REFUSAL:
        return None
    try:
        refusal = Refusal(reason)
    except ValueError as error:
        raise MessageError(f"reason is {reason}") from error
    if kind != Kind.REFUSAL:
        raise MessageError(f"reason is {reason} in a message of kind {kind}")
    return refusal


def rows_per_expert_bytes(header: Header) -> int:
    return header.num_slots * _ROWS_OF_EXPERT.size


def encode_rows_per_expert(rows_per_expert: Sequence[tuple[int, int]]) -> bytes:
    if len(rows_per_expert) == 1:
        return _ROWS_OF_EXPERT.pack(*rows_per_expert[0])
    return struct.pack(f"<{2 * len(rows_per_expert)}I", *chain.from_iterable(rows_per_expert))


def decode_rows_per_expert(encoded: bytes | bytearray | memoryview, header: Header) -> RowsPerExpert:
    """``(expert, rows)`` pairs, experts ascending. Raises MessageError when they do not fit the header."""
    rows_per_expert = tuple(_ROWS_OF_EXPERT.iter_unpack(encoded))
    previous, total = -1, 0
    for expert, rows in rows_per_expert:
        if expert <= previous:
            raise MessageError(f"experts do not ascend: {[expert for expert, _rows in rows_per_expert]}")
        if rows < 1:
            raise MessageError(f"an expert with no rows is listed: {rows_per_expert}")
        previous, total = expert, total + rows
    if total != header.num_rows:
        raise MessageError(f"rows per expert add up to {total}, num_rows is {header.num_rows}")
    return rows_per_expert
