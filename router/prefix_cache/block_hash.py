"""The key of a KV block in the prefix cache: a hash chain over everything that its contents depend on.

A block's keys and values depend on every token before it, on the weights, and on nothing else; the salt keeps
tenants from finding out, by timing, what others have asked. So the chain starts with (weights version, salt), and
each link adds one full block of token ids:

    root = H(weights version, salt)      hash[i] = H(hash[i - 1], tokens of block i)      hash[-1] = root
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import NewType, Protocol

BlockHash = NewType("BlockHash", bytes)


def root_hash(*, weights_version: int, cache_salt: str) -> BlockHash:
    """Where the chain of a request starts."""
    return BlockHash(hashlib.sha256(f"{weights_version}:{cache_salt}".encode()).digest())


def next_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """The hash of the full block with these token_ids (each below 2**32) that follows the block of parent."""
    return BlockHash(hashlib.sha256(parent + array("I", token_ids).tobytes()).digest())


class Hashed(Protocol):
    """What carries a chain: its tokens, where the chain starts, and the hashes of its first full blocks."""

    root_hash: BlockHash
    token_ids: list[int]
    block_hashes: list[BlockHash]


def extend_chain(hashed: Hashed, *, num_blocks: int, block_size: int) -> None:
    """Grows block_hashes to the first num_blocks blocks, all full; what is there already is kept."""
    hashes = hashed.block_hashes
    for index in range(len(hashes), num_blocks):
        parent = hashes[index - 1] if index else hashed.root_hash
        hashes.append(next_hash(parent, hashed.token_ids[index * block_size : (index + 1) * block_size]))
