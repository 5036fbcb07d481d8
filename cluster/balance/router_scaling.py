"""How many routers there should be, by what they have to do. Pure; bounds, and when a decision has lasted long enough
to be followed, are for whoever asks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.balance.router_load import RouterLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterScaling:
    """What one router should have to do at most, on average over all of them: the part of its KV cache in use (0 to 1),
    tokens that wait to be computed, requests. A router goes only when those that remain would stay below these targets
    by margin, a part of each. Raises ValueError for what makes no sense.
    """

    kv_target: float
    waiting_tokens_target: float
    requests_target: float
    margin: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.kv_target <= 1:
            raise ValueError(f"kv_target must be above 0 and at most 1, got {self.kv_target}")
        for name in ("waiting_tokens_target", "requests_target"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.margin < 1:
            raise ValueError(f"margin must be at least 0 and below 1, got {self.margin}")


def wanted_routers(
    *, num_routers: int, loads: Sequence[RouterLoad | None], num_queued: float, scaling: RouterScaling
) -> int:
    """At least 1. num_routers: as decided before. loads: of those that serve; None where it is not known, which proves
    nothing and leaves the number as it is. num_queued: requests that no router has taken yet.
    """
    known = [load for load in loads if load is not None]
    if not known or len(known) < len(loads):
        return num_routers
    at_target = _routers_at_target(known, num_queued, scaling)
    fewest, most = math.ceil(at_target), math.ceil(at_target / (1 - scaling.margin))
    return max(1, min(max(num_routers, fewest), most))


def _routers_at_target(loads: Sequence[RouterLoad], num_queued: float, scaling: RouterScaling) -> float:
    """How many routers would be exactly at the target that is the first to be reached."""
    return max(
        sum(load.kv_use for load in loads) / scaling.kv_target,
        sum(load.num_waiting_tokens for load in loads) / scaling.waiting_tokens_target,
        (sum(load.num_requests for load in loads) + num_queued) / scaling.requests_target,
    )
