"""Ends of a lane that need not keep to the protocol: plain blocking sockets and the bytes of messages."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from experts import message, opening
from experts.message import Header, Identity


def read(sock: socket.socket, num_bytes: int) -> bytes:
    """Exactly num_bytes; raises ConnectionResetError at the end of the stream."""
    received = b""
    while len(received) < num_bytes:
        chunk = sock.recv(num_bytes - len(received))
        if not chunk:
            raise ConnectionResetError("end of stream")
        received += chunk
    return received


def is_closed_by_peer(sock: socket.socket) -> bool:
    """Waits for the end of the stream, reading past whatever still comes."""
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        return True
    return True


def knock(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def open_lane(port: int, *, secret: bytes, shard_id: str, lane_id: str = "raw") -> tuple[socket.socket, int]:
    """An opened lane and its number."""
    sock = knock(port)
    return sock, prove_as_router(sock, secret=secret, shard_id=shard_id, lane_id=lane_id)


def prove_as_router(sock: socket.socket, *, secret: bytes, shard_id: str, lane_id: str = "raw") -> int:
    """Opens the lane; its number."""
    challenge = read(sock, opening.CHALLENGE_BYTES)
    answer = opening.make_answer(
        challenge, secret=secret, nonce=os.urandom(opening.NONCE_BYTES), shard_id=shard_id, lane_id=lane_id
    )
    sock.sendall(answer)
    welcome = read(sock, opening.WELCOME_BYTES)
    return opening.check_welcome(welcome, challenge=challenge, answer=answer, secret=secret).lane


def prove_as_shard(
    sock: socket.socket, terms: opening.LaneTerms, *, secret: bytes, shard_id: str, proof_secret: bytes | None = None
) -> None:
    """Opens the lane of a router that knows the secret. proof_secret: what the proof is made with, if not secret."""
    challenge = opening.make_challenge(os.urandom(opening.NONCE_BYTES))
    sock.sendall(challenge)
    answer = read(sock, opening.ANSWER_BYTES)
    opening.check_answer(answer, challenge=challenge, secret=secret, shard_id=shard_id)
    sock.sendall(opening.make_welcome(terms, challenge=challenge, answer=answer, secret=proof_secret or secret))


def identity(lane: int, **changed: int) -> Identity:
    fields = {"epoch": 7, "weights_version": 0, "step": 1, "layer": 1, "micro_batch": 0, "attempt": 0}
    return Identity(lane=lane, **{**fields, **changed})


def read_request(sock: socket.socket, row_bytes: int) -> tuple[Header, bytes]:
    """The header of the next request and its rows."""
    header = message.decode_header(read(sock, message.HEADER_BYTES), max_rows=1 << 20)
    read(sock, message.rows_per_expert_bytes(header))
    return header, read(sock, header.num_rows * row_bytes)


class FakeShard:
    """Accepts one router, opens the lane, and then does what ``act`` says with the socket, in a thread."""

    def __init__(
        self,
        act: Callable[[socket.socket], None],
        *,
        shard_id: str,
        secret: bytes,
        hidden_size: int,
        proof_secret: bytes | None = None,
    ) -> None:
        """proof_secret: what this shard's own proof is made with, if not secret."""
        self._act = act
        self._shard_id = shard_id
        self._secret = secret
        self._proof_secret = proof_secret
        self._terms = opening.LaneTerms(lane=1, hidden_size=hidden_size, dtype="float32", max_rows=1 << 16)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        sock, _peer = self._listener.accept()
        with sock:
            prove_as_shard(
                sock, self._terms, secret=self._secret, shard_id=self._shard_id, proof_secret=self._proof_secret
            )
            self._act(sock)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
