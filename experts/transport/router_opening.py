"""The router's side of an opening (experts/opening.py), over any stream socket."""

from __future__ import annotations

import os
import socket

from experts.epoch import ShardAddress
from experts.opening import CHALLENGE_BYTES, NONCE_BYTES, WELCOME_BYTES, LaneTerms, check_welcome, make_answer
from experts.transport.exact_read import read_exactly


def open_lane(sock: socket.socket, address: ShardAddress, *, lane_id: str, secret: bytes, deadline: float) -> LaneTerms:
    """Blocks, until deadline (of time.monotonic()) at most. Raises OSError and OpeningError."""
    challenge = read_exactly(sock, CHALLENGE_BYTES, deadline)
    answer = make_answer(
        challenge, secret=secret, nonce=os.urandom(NONCE_BYTES), shard_id=address.shard_id, lane_id=lane_id
    )
    sock.sendall(answer)
    welcome = read_exactly(sock, WELCOME_BYTES, deadline)
    return check_welcome(welcome, challenge=challenge, answer=answer, secret=secret)
