"""The arithmetic of blocks and attention chunks, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockGeometry:
    """block_size divides attention_chunk_size, so no block lies in two chunks. None means no chunks:
    local layers then see, and keep, everything.

    Raises ValueError for sizes that cannot work.
    """

    block_size: int
    attention_chunk_size: int | None

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {self.block_size}")
        if self.attention_chunk_size is not None and self.attention_chunk_size % self.block_size:
            raise ValueError(
                f"block_size {self.block_size} does not divide attention_chunk_size {self.attention_chunk_size}"
            )

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold the first num_tokens."""
        return -(-num_tokens // self.block_size)

    def num_full_blocks(self, num_tokens: int) -> int:
        return num_tokens // self.block_size

    def num_passed_blocks(self, num_tokens: int) -> int:
        """Leading blocks that local layers never read again once num_tokens are computed."""
        if self.attention_chunk_size is None:
            return 0
        return num_tokens // self.attention_chunk_size * self.attention_chunk_size // self.block_size

    def end_of_chunk(self, num_tokens: int, at_most: int) -> int:
        """Where the chunk of the next query ends when num_tokens are computed, or at_most if that comes first."""
        if self.attention_chunk_size is None:
            return at_most
        return min(at_most, (num_tokens // self.attention_chunk_size + 1) * self.attention_chunk_size)
