"""What each router's prefix cache should hold, by what this gateway has sent there. Pure.

A router computes a prompt's blocks when it gets it and keeps them until it needs their room, so a gateway can tell
without asking. What it believes may be wrong, for the router has evicted more than we think or serves other gateways,
too: then a request meets an empty cache, and afterwards we are right.

Blocks go by the engine's own keys (router/prefix_cache/block_hash.py), cut short: weights version, salt and every token
count.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from router.prefix_cache.block_hash import next_hash, root_hash

KEY_BYTES = 8
# Of one prompt, from its start on: what lies behind decides nothing any more.
MAX_KEYS = 1024


def prefix_keys(token_ids: Sequence[int], *, block_size: int, weights_version: int, cache_salt: str) -> bytes:
    """The keys of the full blocks that a cache could help with, one behind the other, MAX_KEYS at most. The last
    token is always computed."""
    tip = root_hash(weights_version=weights_version, cache_salt=cache_salt)
    keys = bytearray()
    for begin in range(0, min((len(token_ids) - 1) // block_size, MAX_KEYS) * block_size, block_size):
        tip = next_hash(tip, token_ids[begin : begin + block_size])
        keys += tip[:KEY_BYTES]
    return bytes(keys)


def split_keys(keys: bytes) -> list[bytes]:
    return [keys[begin : begin + KEY_BYTES] for begin in range(0, len(keys), KEY_BYTES)]


class PrefixIndex:
    """Per router the blocks that were used last, at most max_blocks of them."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._blocks: dict[str, OrderedDict[bytes, None]] = {}

    def note(self, router: str, keys: Sequence[bytes]) -> None:
        """The router computes or has these blocks. As in its cache, a prompt's last blocks are forgotten first."""
        blocks = self._blocks.setdefault(router, OrderedDict())
        for key in reversed(keys):
            blocks[key] = None
            blocks.move_to_end(key)
        while len(blocks) > self._max_blocks:
            blocks.popitem(last=False)

    def num_cached(self, router: str, keys: Sequence[bytes]) -> int:
        """How many of these blocks, from the first on, the router should have."""
        blocks = self._blocks.get(router, OrderedDict())
        return next((index for index, key in enumerate(keys) if key not in blocks), len(keys))

    def keep(self, routers: Collection[str]) -> None:
        """Forgets all others."""
        for router in self._blocks.keys() - set(routers):
            del self._blocks[router]
