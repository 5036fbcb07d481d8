"""How much a router has to do, by the three things of which it can run out. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from router.messages import EngineStats


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLoad:
    """kv_use: 0 to 1, of the group of blocks that is fuller; what is only cached is not in use. num_waiting_tokens: as
    in EngineStats. num_requests: those that run and those that wait in the engine."""

    kv_use: float
    num_waiting_tokens: float
    num_requests: float

    @classmethod
    def of(cls, stats: EngineStats) -> Self:
        used = [1 - stats.num_free_blocks[group] / total for group, total in stats.num_blocks.items()]
        return cls(
            kv_use=max(used, default=0.0),
            num_waiting_tokens=stats.num_waiting_tokens,
            num_requests=stats.num_running + stats.num_waiting,
        )
