"""Which KV blocks each sequence holds, in the two groups of layers, and what of them others may share.

Global layers attend to everything, so a sequence keeps all its global blocks. Local layers attend within chunks of
attention_chunk_size positions, so with n tokens computed it keeps only the local blocks from floor(n / C) * C on:

    C = 8, block size 4, n = 13            n // C * C = 8
    positions   0  4  8 12
    global    [ 7, 2, 9, 5 ]               entry i covers positions [i * block size, (i + 1) * block size)
    local     [ 0, 0, 3, 8 ]               the passed chunk is released, its entries are the null block

The passed chunk goes when a step has ended, so a step that straddles a boundary still has its first query's chunk.
Without an attention_chunk_size local layers see everything, and nothing is released before its sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from router.block_geometry import BlockGeometry
from router.block_pool import NULL_BLOCK, BlockPool
from router.prefix_cache.block_hash import extend_chain, next_hash
from router.prefix_cache.prefix import PrefixHit, find_prefix
from router.sequence import Sequence


class BlockManager:
    """Allocates, shares and frees the blocks of all sequences."""

    def __init__(self, *, geometry: BlockGeometry, num_global_blocks: int, num_local_blocks: int) -> None:
        """Both numbers count the null block. Raises ValueError when nothing is left to hand out."""
        self._geometry = geometry
        self.global_pool = BlockPool(num_global_blocks)
        self.local_pool = BlockPool(num_local_blocks)

    def can_ever_fit(self, num_tokens: int) -> bool:
        """Whether a sequence with this many computed tokens fits when it has the cache to itself."""
        num_local = self._geometry.num_blocks(self._geometry.end_of_chunk(0, at_most=num_tokens))
        num_global = self._geometry.num_blocks(num_tokens)
        return num_global <= self.global_pool.num_usable and num_local <= self.local_pool.num_usable

    def find_prefix(self, sequence: Sequence) -> PrefixHit:
        return find_prefix(sequence, self._geometry, self.global_pool, self.local_pool)

    def can_admit(self, sequence: Sequence, hit: PrefixHit) -> bool:
        """Whether a waiting sequence may start: all its tokens fit now, and of local blocks those of one chunk.

        Nothing is reserved by this: it keeps sequences from starting only to be preempted in the next step.
        """
        needed = self._geometry.num_blocks(sequence.num_tokens) - len(hit.global_blocks)
        if needed > self.global_pool.num_free - self.global_pool.num_idle(hit.global_blocks):
            return False
        chunk_end = self._geometry.end_of_chunk(hit.num_tokens, at_most=sequence.num_tokens)
        needed = self._geometry.num_blocks(chunk_end) - len(hit.local_blocks)
        return needed <= self.local_pool.num_free - self.local_pool.num_idle(hit.local_blocks)

    def adopt(self, sequence: Sequence, hit: PrefixHit) -> None:
        """Gives a sequence without blocks those of the hit; their tokens count as computed."""
        assert not sequence.global_blocks, "a sequence that has begun cannot adopt a prefix"
        for block_id in hit.global_blocks:
            self.global_pool.hold(block_id)
        for block_id in hit.local_blocks:
            if block_id != NULL_BLOCK:
                self.local_pool.hold(block_id)
        sequence.global_blocks.extend(hit.global_blocks)
        sequence.local_blocks.extend(hit.local_blocks)
        sequence.num_computed_tokens = hit.num_tokens

    def num_tokens_that_fit(self, sequence: Sequence, wanted: int) -> int:
        """How many of the next wanted tokens the free blocks can take; 0 when not one."""
        room = min(
            len(sequence.global_blocks) + self.global_pool.num_free,
            len(sequence.local_blocks) + self.local_pool.num_free,
        )
        return min(wanted, room * self._geometry.block_size - sequence.num_computed_tokens)

    def allocate(self, sequence: Sequence, num_tokens: int) -> None:
        """Appends the blocks for the next num_tokens, which num_tokens_that_fit has allowed."""
        num_blocks = self._geometry.num_blocks(sequence.num_computed_tokens + num_tokens)
        for _ in range(num_blocks - len(sequence.global_blocks)):
            sequence.global_blocks.append(self.global_pool.allocate())
            sequence.local_blocks.append(self.local_pool.allocate())

    def take_back(self, sequence: Sequence) -> None:
        """Releases what ``allocate`` has given for tokens that were not computed after all."""
        num_kept = self._geometry.num_blocks(sequence.num_computed_tokens)
        for table, pool in ((sequence.global_blocks, self.global_pool), (sequence.local_blocks, self.local_pool)):
            for block_id in reversed(table[num_kept:]):
                pool.release(block_id)
            del table[num_kept:]

    def advance(self, sequence: Sequence, num_tokens: int) -> None:
        """Counts num_tokens more as computed, once their step has ended: publishes the blocks that are now full,
        unless the sequence is degraded, then releases the local blocks of chunks that are passed."""
        before = sequence.num_computed_tokens
        sequence.num_computed_tokens = before + num_tokens
        if not sequence.degraded:
            self._publish(sequence, before)
        self._release_passed(sequence, before)

    def _publish(self, sequence: Sequence, num_computed_before: int) -> None:
        end = self._geometry.num_full_blocks(sequence.num_computed_tokens)
        extend_chain(sequence, num_blocks=end, block_size=self._geometry.block_size)
        for index in range(self._geometry.num_full_blocks(num_computed_before), end):
            self.global_pool.publish(sequence.global_blocks[index], sequence.block_hashes[index])
            self.local_pool.publish(sequence.local_blocks[index], sequence.block_hashes[index])

    def _release_passed(self, sequence: Sequence, num_computed_before: int) -> None:
        first = self._geometry.num_passed_blocks(num_computed_before)
        for index in reversed(range(first, self._geometry.num_passed_blocks(sequence.num_computed_tokens))):
            self.local_pool.release(sequence.local_blocks[index])
            sequence.local_blocks[index] = NULL_BLOCK

    def free(self, sequence: Sequence) -> None:
        """Takes all blocks from a sequence. The tail goes first, so that it is also evicted first."""
        for block_id in reversed(sequence.global_blocks):
            self.global_pool.release(block_id)
        for block_id in reversed(sequence.local_blocks):
            if block_id != NULL_BLOCK:
                self.local_pool.release(block_id)
        sequence.global_blocks.clear()
        sequence.local_blocks.clear()
        sequence.num_computed_tokens = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Asserts, between two steps, that pools, hashes and the tables of these sequences agree.

        sequences must be all that may hold blocks. Costs time in proportion to all tokens: for tests.
        """
        held_global: Counter[int] = Counter()
        held_local: Counter[int] = Counter()
        for sequence in sequences:
            self._check_tables(sequence)
            self._check_hashes(sequence)
            held_global.update(sequence.global_blocks)
            held_local.update(block_id for block_id in sequence.local_blocks if block_id != NULL_BLOCK)
        self.global_pool.check_integrity(held_global)
        self.local_pool.check_integrity(held_local)

    def _check_tables(self, sequence: Sequence) -> None:
        name, table = sequence.request_id, sequence.global_blocks
        num_blocks = self._geometry.num_blocks(sequence.num_computed_tokens)
        assert len(table) == len(set(table)) == num_blocks, f"{name}: the global table is wrong"
        num_passed = self._geometry.num_passed_blocks(sequence.num_computed_tokens)
        passed, kept = sequence.local_blocks[:num_passed], sequence.local_blocks[num_passed:]
        assert passed == [NULL_BLOCK] * num_passed, f"{name}: local blocks of a passed chunk are kept"
        assert NULL_BLOCK not in kept, f"{name}: a local block of the current chunk is missing"
        assert len(kept) == len(set(kept)) == num_blocks - num_passed, f"{name}: the local table is wrong"

    def _check_hashes(self, sequence: Sequence) -> None:
        """A published block is full and found under exactly the tokens up to its end; only such are shared."""
        size, chain, tip = self._geometry.block_size, [], sequence.root_hash
        for index in range(self._geometry.num_full_blocks(sequence.num_computed_tokens)):
            tip = next_hash(tip, sequence.token_ids[index * size : (index + 1) * size])
            chain.append(tip)
        num_known = len(sequence.block_hashes)
        assert sequence.block_hashes[: len(chain)] == chain[:num_known], f"{sequence.request_id}: stale hashes"
        self.global_pool.check_published(sequence.global_blocks, chain)
        self.local_pool.check_published(sequence.local_blocks, chain)
