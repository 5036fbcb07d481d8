"""The shard's side of opening a lane by shm: the opening of every lane, then the region (shm_offer.py)."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from mmap import mmap

from experts.opening import ANSWER_BYTES, NONCE_BYTES, OpeningError, make_challenge
from experts.transport.base import LinkError
from experts.transport.rules import LaneRules
from experts.transport.shm_offer import OFFER_BYTES, READY, decode_offer, region_shape
from experts.transport.shm_port import Announcing
from experts.transport.shm_region import RegionShape, map_region


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """A router's region, checked and mapped."""

    map: mmap
    shape: RegionShape
    announcing: Announcing


class ShmOpening:
    """lane_id: the router's name for the lane, None until it has proved itself."""

    def __init__(self, sock: socket.socket, lane: int, rules: LaneRules) -> None:
        """The socket is non-blocking and stays the caller's."""
        self.lane_id: str | None = None
        self._socket = sock
        self._lane = lane
        self._rules = rules
        self._challenge = make_challenge(os.urandom(NONCE_BYTES))
        self._heard = b""
        self._descriptors: list[int] = []

    def challenge(self) -> None:
        """Sends the first message. Raises LinkError."""
        self._send(self._challenge)

    def hear(self) -> Shared | None:
        """Reads what is there; the region once it has come. Raises LinkError and MessageError."""
        wanted = ANSWER_BYTES if self.lane_id is None else OFFER_BYTES
        self._heard += self._receive(wanted - len(self._heard))
        if len(self._heard) < wanted:
            return None
        message, self._heard = self._heard, b""
        if self.lane_id is None:
            self._welcome(message)
            return None
        return self._accept(message)

    def close(self) -> None:
        """Closes what came along and was not wanted. Idempotent."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _receive(self, num_bytes: int) -> bytes:
        try:
            received, descriptors, _flags, _peer = socket.recv_fds(self._socket, num_bytes, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise LinkError(f"receiving failed: {error}") from error
        self._descriptors += descriptors
        if not received:
            raise LinkError("closed by the other end")
        return received

    def _welcome(self, answer: bytes) -> None:
        lane_id, welcome = self._rules.welcome(answer, challenge=self._challenge, lane=self._lane)
        if self._descriptors:
            raise OpeningError("a descriptor came with the answer")
        self._send(welcome)
        self.lane_id = lane_id

    def _accept(self, offer: bytes) -> Shared:
        largest = region_shape(max_rows=self._rules.max_rows, row_bytes=self._rules.row_bytes)
        shape, announcing = decode_offer(offer, largest=largest)
        if len(self._descriptors) != 1:
            raise OpeningError(f"{len(self._descriptors)} descriptors came with the offer of a region, not 1")
        shared = Shared(map=map_region(self._descriptors[0], shape), shape=shape, announcing=announcing)
        self.close()
        self._send(READY)
        return shared

    def _send(self, message: bytes) -> None:
        try:
            sent = self._socket.send(message)
        except OSError as error:
            raise LinkError(f"sending failed: {error}") from error
        if sent != len(message):
            raise LinkError("sending failed: the other end does not listen")
