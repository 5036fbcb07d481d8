"""What the engines of a running service say of themselves."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress

from conftest import WAIT_S, Service, wait_until
from ray import serve
from ray.serve.exceptions import BackPressureError

from cluster.app import ROUTER
from router.messages import EngineStats

Stats = Mapping[str, EngineStats]
CALLS_AT_ONCE = 8
# Heartbeats come twice a second; on a busy machine they may be late.
MAX_AGE_S = 1.5


class EngineWatch:
    """Asks the routers of one application. What they say is up to MAX_AGE_S old."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._handle = serve.get_deployment_handle(ROUTER, service.app_name)

    def stats(self) -> Stats:
        """Of every router, by its id."""
        wanted = {router["id"] for router in self._service.view()["routers"]}
        found: dict[str, EngineStats] = {}

        def hear_all() -> bool:
            # Serve picks the replica, the less busy one rather: only calls that are open at once reach all.
            for call in [self._handle.engine_stats.remote() for _ in range(CALLS_AT_ONCE)]:
                with suppress(BackPressureError):
                    router_id, stats = call.result(timeout_s=WAIT_S)
                    if stats is not None:
                        found[router_id] = stats
            return wanted <= found.keys()

        wait_until(hear_all, f"statistics of {sorted(wanted)}")
        return found

    def wait_until_idle(self, timeout_s: float = WAIT_S) -> Stats:
        """Until no router has a request, and every KV block can be handed out: said for longer than it may be old."""
        seen: list[Stats] = []
        idle_since: list[float] = []

        def is_idle_for_long() -> bool:
            seen.append(self.stats())
            if not all(map(is_idle, seen[-1].values())):
                idle_since.clear()
                return False
            idle_since.append(time.monotonic())
            return idle_since[-1] - idle_since[0] > MAX_AGE_S

        try:
            wait_until(is_idle_for_long, "all engines idle, all blocks free", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; they say {seen[-1]}") from None
        return seen[-1]


def is_idle(stats: EngineStats) -> bool:
    return stats.num_running == stats.num_waiting == 0 and stats.num_free_blocks == stats.num_blocks


def total(stats: Stats, field: str) -> int:
    return sum(int(getattr(one, field)) for one in stats.values())
