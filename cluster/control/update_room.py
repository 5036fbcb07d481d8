"""Whether memories hold a second version of the weights beside the first, and how much is missing where not. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

# The rest is for what else grows meanwhile: KV caches, buffers, other processes.
USABLE_SHARE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one process takes more: member, the memory that it fills, and how much of it."""

    member: str
    memory: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Of one memory, which its members may share: a host's or a GPU's."""

    memory: str
    members: tuple[str, ...]
    needed_bytes: int
    free_bytes: int

    @property
    def missing_bytes(self) -> int:
        return max(0, self.needed_bytes - int(self.free_bytes * USABLE_SHARE))

    def to_dict(self) -> dict[str, Any]:
        """Under the names of arriero.v1.MemoryRoom."""
        return {**asdict(self), "members": list(self.members), "missing_bytes": self.missing_bytes}

    def __str__(self) -> str:
        return (
            f"{self.missing_bytes} bytes are missing on {self.memory}: {', '.join(self.members)} need "
            f"{self.needed_bytes}, {self.free_bytes} are free, of which {USABLE_SHARE:.0%} may be used"
        )


def rooms(needs: Iterable[Need], free_bytes: Mapping[str, int]) -> tuple[Room, ...]:
    """By memory. free_bytes: of each that a need names."""
    by_memory: dict[str, list[Need]] = {}
    for need in needs:
        by_memory.setdefault(need.memory, []).append(need)
    return tuple(
        Room(
            memory=memory,
            members=tuple(need.member for need in found),
            needed_bytes=sum(need.num_bytes for need in found),
            free_bytes=free_bytes[memory],
        )
        for memory, found in by_memory.items()
    )
