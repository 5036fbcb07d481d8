"""How much of a sequence is already in the cache.

A prefix of n tokens can be taken when the global group has all its blocks and the local group those of
[n // C * C, n). n = k * C needs no local block at all, so a hit is cut back at worst to a chunk boundary:

    C = 8, block size 4            found in the global group: blocks 0 1 2 3 4, n = 20, its chunk starts at 16
    local group has block 4     -> n = 20
    local group has not         -> n = 16, which asks for no local block
"""

from __future__ import annotations

from dataclasses import dataclass

from router.block_geometry import BlockGeometry
from router.block_pool import NULL_BLOCK, BlockPool
from router.prefix_cache.block_hash import extend_chain
from router.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixHit:
    """The head of a sequence found in the cache, as block tables that cover exactly num_tokens positions."""

    num_tokens: int
    global_blocks: tuple[int, ...]
    local_blocks: tuple[int, ...]


NO_HIT = PrefixHit(num_tokens=0, global_blocks=(), local_blocks=())


def find_prefix(
    sequence: Sequence, geometry: BlockGeometry, global_pool: BlockPool, local_pool: BlockPool
) -> PrefixHit:
    """The longest usable head of the sequence in the cache. At least one token is left to compute.

    A sequence that still needs prompt log probabilities must compute every token, so it finds nothing.
    """
    if sequence.num_missing_prompt_logprobs:
        return NO_HIT
    global_blocks = _find_global(sequence, geometry, global_pool)
    num_passed = geometry.num_passed_blocks(len(global_blocks) * geometry.block_size)
    local_blocks = [NULL_BLOCK] * num_passed + _find_local(sequence, num_passed, len(global_blocks), local_pool)
    num_blocks = len(local_blocks)
    return PrefixHit(
        num_tokens=num_blocks * geometry.block_size,
        global_blocks=tuple(global_blocks[:num_blocks]),
        local_blocks=tuple(local_blocks),
    )


def _find_global(sequence: Sequence, geometry: BlockGeometry, pool: BlockPool) -> list[int]:
    """Published blocks from the start on, without a gap. Hashes are computed only as far as there are hits."""
    found: list[int] = []
    for index in range(geometry.num_full_blocks(sequence.num_tokens - 1)):
        extend_chain(sequence, num_blocks=index + 1, block_size=geometry.block_size)
        block_id = pool.find(sequence.block_hashes[index])
        if block_id is None:
            break
        found.append(block_id)
    return found


def _find_local(sequence: Sequence, first: int, end: int, pool: BlockPool) -> list[int]:
    """Published blocks of the logical blocks first .. end - 1, up to the first that is not there."""
    found: list[int] = []
    for block_hash in sequence.block_hashes[first:end]:
        block_id = pool.find(block_hash)
        if block_id is None:
            break
        found.append(block_id)
    return found
