"""What the engines of a running service say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from conftest import WAIT_S, Service, wait_until
from ray import serve

from cluster.app import ROUTER
from router.messages import EngineStats

Stats = Mapping[str, EngineStats]


class EngineWatch:
    """Asks the routers of one application. What they say is up to a second old."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._handle = serve.get_deployment_handle(ROUTER, service.app_name)

    def stats(self) -> Stats:
        """Of every router, by its id."""
        wanted = {router["id"] for router in self._service.view()["routers"]}
        found: dict[str, EngineStats] = {}

        def hear_all() -> bool:
            # Serve picks the replica; each is picked soon enough.
            router_id, stats = self._handle.engine_stats.remote().result(timeout_s=WAIT_S)
            if stats is not None:
                found[router_id] = stats
            return wanted <= found.keys()

        wait_until(hear_all, f"statistics of {sorted(wanted)}")
        return found

    def wait_for(self, condition: Callable[[Stats], bool], what: str, timeout_s: float = WAIT_S) -> Stats:
        """The first statistics that meet the condition."""
        seen: list[Stats] = []

        def is_met() -> bool:
            seen.append(self.stats())
            return condition(seen[-1])

        try:
            wait_until(is_met, what, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; the engines say {seen[-1]}") from None
        return seen[-1]


def is_idle(stats: Stats) -> bool:
    """No router has a request, and every KV block can be handed out."""
    return all(
        one.num_running == one.num_waiting == 0 and one.num_free_blocks == one.num_blocks for one in stats.values()
    )


def total(stats: Stats, field: str) -> int:
    return sum(int(getattr(one, field)) for one in stats.values())
