"""The router's end of a lane over plain TCP."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence

import torch

from experts.epoch import ShardAddress
from experts.message import (
    HEADER_BYTES,
    Header,
    Identity,
    Kind,
    MessageError,
    decode_header,
    encode_header,
    encode_rows_per_expert,
)
from experts.opening import (
    CHALLENGE_BYTES,
    NONCE_BYTES,
    WELCOME_BYTES,
    LaneTerms,
    OpeningError,
    check_welcome,
    make_answer,
)
from experts.transport.base import Link, LinkError
from experts.transport.exact_read import read_exactly
from experts.transport.stream import ByteStream, Parser, byte_view, discard, tune


def connect(address: ShardAddress, *, lane_id: str, secret: bytes, timeout_s: float) -> Link:
    """Connects and opens a lane: blocking, but no longer than timeout_s. Raises LinkError."""
    deadline = time.monotonic() + timeout_s
    try:
        sock = socket.create_connection((address.host, address.port), timeout=timeout_s)
    except OSError as error:
        raise LinkError(f"phase connect: {error}") from error
    try:
        tune(sock, dead_after_s=timeout_s)
        terms = _open(sock, address, lane_id, secret, deadline)
    except (OSError, OpeningError) as error:
        sock.close()
        raise LinkError(f"phase opening: {error}") from error
    return TcpLink(sock, terms)


def _open(sock: socket.socket, address: ShardAddress, lane_id: str, secret: bytes, deadline: float) -> LaneTerms:
    challenge = read_exactly(sock, CHALLENGE_BYTES, deadline)
    answer = make_answer(
        challenge, secret=secret, nonce=os.urandom(NONCE_BYTES), shard_id=address.shard_id, lane_id=lane_id
    )
    sock.sendall(answer)
    welcome = read_exactly(sock, WELCOME_BYTES, deadline)
    return check_welcome(welcome, challenge=challenge, answer=answer, secret=secret)


class TcpLink:
    """Made by ``connect``. Once broken only ``close`` is of use: there is no silent reconnect."""

    def __init__(self, sock: socket.socket, terms: LaneTerms) -> None:
        self.terms = terms
        self.broken: str | None = None
        self._row_bytes = terms.hidden_size * getattr(torch, terms.dtype).itemsize
        self._expected: dict[Identity, tuple[Header, list[memoryview]]] = {}
        self._arrived: list[Header] = []
        self._stream = ByteStream(sock, self._parse())

    @property
    def sending(self) -> bool:
        return self._stream.sending

    def fileno(self) -> int:
        return self._stream.fileno()

    def submit(
        self,
        header: Header,
        rows_per_expert: Sequence[tuple[int, int]],
        rows: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
    ) -> None:
        self._expected[header.identity] = (header, [byte_view(result) for result in results])
        opening = encode_header(header) + encode_rows_per_expert(rows_per_expert)
        self._stream.send([opening, *(byte_view(part) for part in rows)])

    def advance(self) -> list[Header]:
        try:
            self._stream.receive()
            self._stream.flush()
        except MessageError as error:
            self.broken = f"broke the protocol: {error}"
        except LinkError as error:
            self.broken = str(error)
        arrived, self._arrived = self._arrived, []
        return arrived

    def abandon(self, header: Header) -> None:
        self._expected.pop(header.identity, None)

    def close(self) -> None:
        self._stream.close()
        self._expected.clear()

    def _parse(self) -> Parser:
        encoded = memoryview(bytearray(HEADER_BYTES))
        while True:
            yield encoded
            header = decode_header(encoded, max_rows=self.terms.max_rows)
            if header.kind is Kind.REQUEST:
                raise MessageError("a shard sent a request")
            if header.kind is Kind.REPLY:
                yield from self._parse_rows(header)
            # An answer that nobody waits for, an abandoned attempt's, ends here.
            if self._expected.pop(header.identity, None) is not None:
                self._arrived.append(header)

    def _parse_rows(self, header: Header) -> Parser:
        expected = self._expected.get(header.identity)
        if expected is None:
            yield from discard(header.num_rows * self._row_bytes)
            return
        request, results = expected
        if (header.num_rows, header.num_slots) != (request.num_rows, request.num_slots):
            raise MessageError(f"the reply has {header.num_rows} rows, the request had {request.num_rows}")
        yield from results
