"""The router's end of a lane over plain TCP."""

from __future__ import annotations

import socket
import time
from collections.abc import Generator

import torch

from experts.epoch import ShardAddress
from experts.message import HEADER_BYTES, PULSE, Kind, MessageError
from experts.opening import LaneTerms, OpeningError
from experts.transport.base import Link, LinkError, LinkRequest
from experts.transport.router_opening import open_lane
from experts.transport.stream import ByteStream, Parser, discard, tune
from experts.transport.under_way import UnderWay


def connect(address: ShardAddress, *, lane_id: str, secret: bytes, timeout_s: float) -> Link:
    """Connects and opens a lane: blocking, but no longer than timeout_s. Raises LinkError."""
    deadline = time.monotonic() + timeout_s
    try:
        sock = socket.create_connection((address.host, address.port), timeout=timeout_s)
    except OSError as error:
        raise LinkError(f"phase connect: {error}") from error
    try:
        tune(sock, dead_after_s=timeout_s)
        terms = open_lane(sock, address, lane_id=lane_id, secret=secret, deadline=deadline)
    except (OSError, OpeningError) as error:
        sock.close()
        raise LinkError(f"phase opening: {error}") from error
    return TcpLink(sock, terms)


class TcpLink:
    """Made by ``connect``. Once broken only ``close`` is of use: there is no silent reconnect."""

    transport = "tcp"

    def __init__(self, sock: socket.socket, terms: LaneTerms) -> None:
        self.terms = terms
        self.broken: str | None = None
        self._row_bytes = terms.hidden_size * getattr(torch, terms.dtype).itemsize
        self._under_way = UnderWay(terms.max_rows)
        self._answered: list[LinkRequest] = []
        self._stream = ByteStream(sock, self._parse())

    @property
    def sending(self) -> bool:
        return self._stream.sending

    @property
    def wants_to_write(self) -> bool:
        return self._stream.sending

    @property
    def progress(self) -> int:
        return self._stream.num_moved_bytes

    def fileno(self) -> int:
        return self._stream.fileno()

    def submit(self, request: LinkRequest) -> None:
        self._under_way.add(request)
        self._stream.send([request.header, request.pairs, *request.rows])

    def hear(self) -> None:
        try:
            self._stream.receive()
        except MessageError as error:
            self.broken = f"broke the protocol: {error}"
        except LinkError as error:
            self.broken = str(error)

    def advance(self) -> list[LinkRequest]:
        try:
            self._stream.flush()
        except LinkError as error:
            self.broken = self.broken or str(error)
        answered, self._answered = self._answered, []
        return answered

    def abandon(self, request: LinkRequest) -> None:
        request.abandoned = True

    def close(self) -> None:
        self._stream.close()

    def _parse(self) -> Parser:
        encoded = bytearray(HEADER_BYTES)
        while True:
            yield memoryview(encoded)
            answer = bytes(encoded)
            if answer == PULSE:
                continue
            request = self._under_way.get(answer)
            if request is not None and not request.abandoned:
                yield from request.results
                self._under_way.pop(answer)
            else:
                request = yield from self._parse_unexpected(answer)
            # It may have been abandoned while its rows came in.
            if request is not None and not request.abandoned:
                self._answered.append(request)

    def _parse_unexpected(self, answer: bytes) -> Generator[memoryview, None, LinkRequest | None]:
        """A refusal, or the reply to an abandoned attempt, which ends here."""
        header = self._under_way.judge(answer)
        if header.kind is Kind.REPLY:
            yield from discard(header.num_rows * self._row_bytes)
        return self._under_way.take_out(header, answer)
