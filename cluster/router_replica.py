"""The router's Serve replica: one router, or two of different weights versions during an update. It only forwards."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import ray
from ray import serve

from cluster.balance.router_load import RouterLoad
from cluster.config import parse_config
from cluster.control.membership import MemberId
from cluster.router_member import ReplicaHooks, RouterMember
from cluster.router_versions import version_change
from experts.logs import configure_logging
from router.messages import EngineStats, ErrorCode, Finished, FinishReason, encode
from router.replica import EngineDiedError

logger = logging.getLogger("arriero.router")

# For the errors of open calls to leave before the replica does.
FAREWELL_S = 0.5


class RouterReplica:
    """Serve's deployment body; see cluster.app. Imports no torch: engines live in child processes.

    During an update a second router starts beside the first, which goes on; a request goes to the one of its version.
    """

    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]
        """config: a ServiceConfig as a plain dict. Serve awaits this. Raises what keeps the router from starting."""
        self._routers: dict[int, RouterMember] = {}
        self._failed: dict[int, str] = {}
        self._starting: int | None = None
        self._told_in_order: tuple[int, ...] = ()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_leaving = threading.Event()
        self._service = parse_config(config)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._hooks = ReplicaHooks(
            name=self._name,
            node_id=ray.get_runtime_context().get_node_id(),
            on_death=self._leave_with_engine,
            on_weights=self._follow_weights,
            failed_versions=lambda: self._failed,
        )
        first = RouterMember(self._service, self._hooks)
        configure_logging(self._service.log_settings, process=first.member.member_id)
        await first.start()
        self._routers[first.weights_version] = first

    async def generate(
        self, request: bytes, *, weights_version: int, shun: Sequence[str] = (), prefix: bytes = b""
    ) -> bytes:
        """See router.replica.Router.generate. shun (replicas and nodes) and prefix are for
        cluster.front.router_choice, on the way here. A version that is not here (any more) ends like a router that is
        silent: another one may have it."""
        router = self._routers.get(weights_version)
        if router is not None:
            return await router.generate(request)
        error = f"weights version {weights_version} is not at this router"
        gone = Finished(
            request_id="",
            attempt=0,
            finish_reason=FinishReason.ABORT,
            error=error,
            error_code=ErrorCode.UNAVAILABLE,
            suspect=self._name,
        )
        return encode(gone)

    def engine_stats(self) -> tuple[MemberId, EngineStats | None]:
        """Who this is, and its newest engine as of the last heartbeat; None before the first."""
        newest = self._routers[max(self._routers)]
        return newest.member.member_id, newest.router.stats

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve where it may change the number of routers; empty before the first heartbeat. For
        cluster.router_autoscaling."""
        told = [router.router.stats for router in self._routers.values()]
        loads = [asdict(RouterLoad.of(stats)) for stats in told if stats is not None]
        return {name: max(load[name] for load in loads) for name in loads[0]} if loads else {}

    def check_health(self) -> None:
        """Called by Serve; raises when this replica must be replaced, and sees to it that it is.

        Serve would wait for the open calls of an ill replica to end, which they cannot.
        """
        try:
            for router in [*self._routers.values()]:
                router.router.check_health()
        except EngineDiedError as error:
            self._leave_with_engine(str(error))
            raise

    def __del__(self) -> None:
        """Called by Serve at the end of a graceful shutdown, and once more by Python; absent attributes: Serve had no
        place for us."""
        routers, self._routers = getattr(self, "_routers", {}), {}
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        for router in routers.values():
            router.close()

    def _leave_with_engine(self, reason: str) -> None:
        """A replica without a working engine would draw requests, being the least busy; Serve replaces a dead one at
        once. What is left of its engines ends with us. From any thread; only the first call counts."""
        if self._is_leaving.is_set():
            return
        self._is_leaving.set()
        logger.error("the engine is lost, this replica ends: %s", reason)
        timer = threading.Timer(FAREWELL_S, os._exit, (1,))
        timer.daemon = True
        timer.start()

    def _follow_weights(self, told: dict[str, Any]) -> None:
        """told: see Updating.versions_told. Each router here hears it, and not always in the same order."""
        order = tuple(told["order"])
        if order < self._told_in_order:
            return
        self._told_in_order, wanted = order, told["wanted"]
        for version in self._failed.keys() - set(wanted):
            del self._failed[version]
        change = version_change(wanted=wanted, ready=self._routers, failed=self._failed, starting=self._starting)
        if change.start is not None:
            self._starting = change.start
            self._begin(self._start(change.start))
        for version in change.stop:
            if self._routers[version].num_open == 0:
                self._begin(self._stop(self._routers.pop(version)))

    async def _start(self, version: int) -> None:
        router = RouterMember(self._service, self._hooks)
        logger.info("weights version %d: starting %s", version, router.member.member_id)
        try:
            await router.start(version)
        except Exception as error:  # noqa: BLE001 whatever it is, the controller hears it
            self._failed[version] = str(error) or type(error).__name__
            logger.error("no router of weights version %d: %s", version, self._failed[version])
        else:
            self._routers[version] = router
        finally:
            self._starting = None
        for each in self._routers.values():
            each.report_now()

    async def _stop(self, router: RouterMember) -> None:
        logger.info("%s ends: weights version %d has no requests", router.member.member_id, router.weights_version)
        await asyncio.to_thread(router.close)

    def _begin(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
