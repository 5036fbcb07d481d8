"""The KV blocks of one group: who holds them, which are free, and which still hold something worth finding again.

A block is in exactly one of three places:

    held       num_holders >= 1; in that many block tables
    blank      free, its contents are worth nothing
    idle       free, but published under a hash: a prefix hit can take it back until it is evicted, oldest first
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from router.prefix_cache.block_hash import BlockHash

NULL_BLOCK = 0


class BlockPool:
    """Hands out the block ids 1 .. num_blocks - 1. Block 0 is the null block of empty table entries."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2 (one of them is the null block), not {num_blocks}")
        self.num_blocks = num_blocks
        self._num_holders = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._block_of_hash: dict[BlockHash, int] = {}
        self._hash_of_block: dict[int, BlockHash] = {}

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._idle)

    def find(self, block_hash: BlockHash) -> int | None:
        """The block published under this hash, held or idle."""
        return self._block_of_hash.get(block_hash)

    def num_idle(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks are free now and would stop being so when held."""
        return sum(block_id in self._idle for block_id in block_ids)

    def allocate(self) -> int:
        """A block with one holder and no hash. One must be free; when none is blank the longest idle is evicted."""
        assert self.num_free, "allocate() without a free block"
        if self._blank:
            block_id = self._blank.pop()
        else:
            block_id, _ = self._idle.popitem(last=False)
            del self._block_of_hash[self._hash_of_block.pop(block_id)]
        self._num_holders[block_id] = 1
        return block_id

    def hold(self, block_id: int) -> None:
        """Adds a holder to a published block."""
        assert block_id in self._hash_of_block, f"block {block_id} is not published"
        self._idle.pop(block_id, None)
        self._num_holders[block_id] += 1

    def release(self, block_id: int) -> None:
        """Takes one holder away; a block without any is free."""
        assert self._num_holders[block_id] > 0, f"block {block_id} has no holder"
        self._num_holders[block_id] -= 1
        if self._num_holders[block_id]:
            return
        if block_id in self._hash_of_block:
            self._idle[block_id] = None
        else:
            self._blank.append(block_id)

    def publish(self, block_id: int, block_hash: BlockHash) -> None:
        """Lets others find a full block. The first block of a hash keeps it; later equal ones stay private."""
        assert self._num_holders[block_id] > 0, f"block {block_id} has no holder"
        if block_hash not in self._block_of_hash and block_id not in self._hash_of_block:
            self._block_of_hash[block_hash] = block_id
            self._hash_of_block[block_id] = block_hash

    def check_published(self, table: Sequence[int], chain: Sequence[BlockHash]) -> None:
        """Asserts that blocks of a table are published only under the chain's hashes, and shared only so."""
        for index, block_id in enumerate(table):
            block_hash = self._hash_of_block.get(block_id)
            if block_hash is None:
                assert self._num_holders[block_id] <= 1, f"block {block_id} is shared but not published"
            else:
                assert index < len(chain), f"block {block_id} is published but not full"
                assert block_hash == chain[index], f"block {block_id} is published under another prefix"

    def check_integrity(self, held: Counter[int]) -> None:
        """Asserts that the pool is consistent and that each block has the given number of holders."""
        assert NULL_BLOCK not in held, "the null block is held"
        assert Counter({b: n for b, n in enumerate(self._num_holders) if n}) == held, "holders differ from the tables"
        free = [*self._blank, *self._idle]
        assert len(set(free)) == len(free), "a block is free twice"
        assert set(free).isdisjoint(held), "a block is both free and held"
        assert set(free) | set(held) == set(range(1, self.num_blocks)), "a block is lost"
        assert {h: b for b, h in self._hash_of_block.items()} == self._block_of_hash, "the hash maps disagree"
        assert self._hash_of_block.keys() >= self._idle.keys(), "an idle block has no hash"
        assert self._hash_of_block.keys().isdisjoint(self._blank), "a blank block has a hash"
