"""How a region comes to the shard: once the lane is open, over the same Unix socket.

    router -> shard   offer   how entries are announced, the shape of the region, and the memfd itself (SCM_RIGHTS)
    shard -> router   ready   it is mapped

Sockets are named in Linux's abstract namespace: no file to sweep, gone with its process however that ends, and one
namespace per network namespace, so that several hosts or containers on one machine cannot meet by mistake. The name
is random, as a name of the file system would have to be; it protects nothing, the opening does.
"""

from __future__ import annotations

import secrets
import struct

from experts.opening import OpeningError
from experts.transport.shm_port import Announcing
from experts.transport.shm_region import RegionShape

_OFFER = struct.Struct("<4sIIQ")
_MAGIC = b"ARM1"

OFFER_BYTES = _OFFER.size
READY = b"ARM1 ok\0"


def new_socket_name() -> str:
    """Without the NUL that makes it abstract; see ``abstract``."""
    return f"arriero-{secrets.token_hex(16)}"


def abstract(name: str) -> bytes:
    return b"\0" + name.encode()


def region_shape(*, max_rows: int, row_bytes: int) -> RegionShape:
    """Room for one request of the largest size; what does not fit beside others waits for them."""
    pairs_bytes = 8 * min(max_rows, 0xFFFF)
    return RegionShape(row_bytes=row_bytes, num_rows=max_rows + -(-pairs_bytes // row_bytes))


def encode_offer(shape: RegionShape, announcing: Announcing) -> bytes:
    return _OFFER.pack(_MAGIC, announcing, shape.row_bytes, shape.num_rows)


def decode_offer(encoded: bytes, *, largest: RegionShape) -> tuple[RegionShape, Announcing]:
    """Raises OpeningError for an offer that the shard does not take."""
    magic, announcing, row_bytes, num_rows = _OFFER.unpack(encoded)
    if magic != _MAGIC:
        raise OpeningError(f"magic is {magic!r}, not {_MAGIC!r}")
    if announcing not in set(Announcing):
        raise OpeningError(f"announcing is {announcing}")
    if row_bytes != largest.row_bytes or not 1 <= num_rows <= largest.num_rows:
        raise OpeningError(
            f"the region has {num_rows} rows of {row_bytes} bytes, not 1 to {largest.num_rows} of {largest.row_bytes}"
        )
    return RegionShape(row_bytes=row_bytes, num_rows=num_rows), Announcing(announcing)
