"""How many KV cache blocks a router gets, from the memory at hand and what the operator asks for."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
_NUM_NULL_BLOCKS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class KvDemand:
    """What the cache is for. Bytes are of one block in all layers of the group.

    attention_chunk_size None means that local layers keep every position, as global layers do. Raises ValueError
    for a number below 1.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    attention_chunk_size: int | None
    global_block_bytes: int
    local_block_bytes: int

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    @property
    def global_blocks_per_sequence(self) -> int:
        """Of a sequence of full length."""
        return self.num_blocks(self.max_model_len)

    @property
    def local_blocks_per_sequence(self) -> int:
        """At most: the chunk that a step begins in and the tokens the step adds."""
        if self.attention_chunk_size is None:
            return self.global_blocks_per_sequence
        return self.num_blocks(min(self.max_model_len, self.attention_chunk_size + self.max_num_batched_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCapacity:
    """Blocks of each group, the null block included."""

    num_global_blocks: int
    num_local_blocks: int
    num_bytes: int

    def describe(self, demand: KvDemand) -> str:
        """A sentence for the log."""
        num_tokens = (self.num_global_blocks - _NUM_NULL_BLOCKS) * demand.block_size
        return (
            f"KV cache of {self.num_bytes / GIB:.2f} GiB: {self.num_global_blocks} global and "
            f"{self.num_local_blocks} local blocks of {demand.block_size} tokens hold {num_tokens} tokens, "
            f"{num_tokens / demand.max_model_len:.1f} sequences of max_model_len {demand.max_model_len}"
        )


def fixed_capacity(demand: KvDemand, *, num_kv_blocks: int, memory_bytes: int) -> KvCapacity:
    """num_kv_blocks usable blocks for global layers, and for local layers as many as can be of use.

    Raises ValueError when a sequence of max_model_len does not fit in them, or they not in memory_bytes.
    """
    if num_kv_blocks < 1:
        raise ValueError(f"num_kv_blocks must be at least 1, not {num_kv_blocks}")
    if num_kv_blocks < demand.global_blocks_per_sequence:
        raise ValueError(
            f"num_kv_blocks {num_kv_blocks} of {demand.block_size} tokens hold sequences of "
            f"{num_kv_blocks * demand.block_size} tokens, max_model_len is {demand.max_model_len}: "
            f"raise num_kv_blocks to {demand.global_blocks_per_sequence} or lower max_model_len"
        )
    capacity = _capacity(demand, num_kv_blocks)
    if capacity.num_bytes > memory_bytes:
        raise ValueError(
            f"num_kv_blocks {num_kv_blocks} takes {capacity.num_bytes / GIB:.2f} GiB of memory, "
            f"{memory_bytes / GIB:.2f} GiB are free: {_num_fitting(demand, memory_bytes, num_kv_blocks)} blocks fit"
        )
    return capacity


def fitting_capacity(demand: KvDemand, *, memory_bytes: int) -> KvCapacity:
    """As many blocks as fit, but no more than max_num_seqs sequences of full length fill.

    Raises ValueError, saying which max_model_len fits, when not even one sequence does.
    """
    most_useful = demand.max_num_seqs * demand.global_blocks_per_sequence
    num_fitting = _num_fitting(demand, memory_bytes, most_useful)
    if num_fitting < demand.global_blocks_per_sequence:
        raise ValueError(
            f"max_model_len {demand.max_model_len} does not fit: the KV cache may take {memory_bytes / GIB:.2f} GiB, "
            f"which holds sequences of {num_fitting * demand.block_size} tokens; lower max_model_len or "
            f"free memory"
        )
    return _capacity(demand, num_fitting)


def _num_fitting(demand: KvDemand, memory_bytes: int, most: int) -> int:
    """Usable global blocks, up to most, that fit with the local blocks that belong to them. Their size grows with
    their number, so bisection finds it."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if _capacity(demand, middle).num_bytes <= memory_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def _capacity(demand: KvDemand, num_usable: int) -> KvCapacity:
    num_global = num_usable + _NUM_NULL_BLOCKS
    num_local = num_global
    if demand.attention_chunk_size is not None:
        num_local = min(num_usable, demand.max_num_seqs * demand.local_blocks_per_sequence) + _NUM_NULL_BLOCKS
    num_bytes = num_global * demand.global_block_bytes + num_local * demand.local_block_bytes
    return KvCapacity(num_global_blocks=num_global, num_local_blocks=num_local, num_bytes=num_bytes)
