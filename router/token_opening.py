"""The token path's first words and its framing, for both its ends.

    gateway -> engine   challenge   version, nonce
    engine -> gateway   answer      version, nonce, the gateway's address, the router's id, HMAC over all so far
    gateway -> engine   welcome     HMAC over all so far
    engine -> gateway   batches     little-endian length (4 bytes), TokenBatch as MessagePack; until either hangs up
    gateway -> engine   aborts      the same with an Abort, meanwhile

The opening is that of a lane (experts/opening.py), with the gateway in the shard's place.
"""

from __future__ import annotations

import hmac
import os
import struct

from experts.opening import NONCE_BYTES, OpeningError, check_answer
from experts.opening import make_answer as make_lane_answer
from experts.opening import make_challenge as make_lane_challenge

LENGTH = struct.Struct("<I")
# The largest encoded TokenBatch: what a gateway allocates for a router that has proved itself.
MAX_BATCH_BYTES = 64 << 20
# The largest encoded Abort. A request_id is the client's 256 characters, and a little of ours.
MAX_ABORT_BYTES = 4096
WELCOME_BYTES = 32


def frame(message: bytes) -> bytes:
    return LENGTH.pack(len(message)) + message


def make_challenge() -> bytes:
    return make_lane_challenge(os.urandom(NONCE_BYTES))


def make_answer(challenge: bytes, *, secret: bytes, address: str, router_id: str) -> bytes:
    """Raises OpeningError if challenge is none, ValueError for an address or id longer than 96 bytes."""
    nonce = os.urandom(NONCE_BYTES)
    return make_lane_answer(challenge, secret=secret, nonce=nonce, shard_id=address, lane_id=router_id)


def check_router(answer: bytes, *, challenge: bytes, secret: bytes, address: str) -> str:
    """The router's id. Raises OpeningError if its proof is wrong or it wants another gateway."""
    return check_answer(answer, challenge=challenge, secret=secret, shard_id=address)


def make_welcome(*, challenge: bytes, answer: bytes, secret: bytes) -> bytes:
    return hmac.digest(secret, b"arriero gateway" + challenge + answer, "sha256")


def check_welcome(welcome: bytes, *, challenge: bytes, answer: bytes, secret: bytes) -> None:
    """Raises OpeningError if the gateway's proof is wrong."""
    if not hmac.compare_digest(welcome, make_welcome(challenge=challenge, answer=answer, secret=secret)):
        raise OpeningError("the gateway's proof does not fit this cluster's secret")
