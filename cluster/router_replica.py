"""The router's Serve replica: joins the service, runs a router.replica.Router, reports. It only forwards."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import ray
from ray import serve

from cluster.balance.router_load import RouterLoad
from cluster.config import parse_config
from cluster.control.controller_link import ControllerLink
from cluster.control.member_report import MemberReport
from cluster.control.membership import Member, MemberId, MemberKind, MemberState
from cluster.engine_settings import engine_settings
from cluster.metrics.member_snapshots import router_snapshot
from experts.logs import configure_logging
from experts.process_memory import resident_bytes
from router.lane_state import EpochOffer
from router.messages import EngineStats, Start
from router.replica import EngineDiedError, Router, RouterTimeouts

logger = logging.getLogger("arriero.router")

# For the errors of open calls to leave before the replica does.
FAREWELL_S = 0.5


class RouterReplica:
    """Serve's deployment body; see cluster.app. Imports no torch: the engine lives in a child process."""

    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]
        """config: a ServiceConfig as a plain dict. Serve awaits this. Raises what keeps the router from starting."""
        self._router: Router | None = None
        self._link: ControllerLink | None = None
        self._is_leaving = threading.Event()
        self._is_reporting = False
        service = parse_config(config)
        router_id = MemberId(f"router-{secrets.token_hex(3)}")
        configure_logging(service.log_settings, process=router_id)
        node_id = ray.get_runtime_context().get_node_id()
        self._member = Member(
            member_id=router_id, kind=MemberKind.ROUTER, pid=0, node_id=node_id, state=MemberState.STARTING
        )
        self._link = ControllerLink(service)
        welcome = await self._link.join_router(self._member)
        self._router = Router(
            timeouts=RouterTimeouts(start_s=service.start_timeout_s),
            on_death=self._leave_with_engine,
            on_lanes=_in_loop(self._tell_now),
            on_doubt=self._tell_now,
            name=serve.get_replica_context().replica_id.unique_id,
        )
        ready = await self._router.start(_start_message(router_id, welcome))
        self._member = Member(
            member_id=router_id, kind=MemberKind.ROUTER, pid=ready.pid, node_id=node_id, state=MemberState.READY
        )
        self._link.start_reporting(self._report, self._follow)
        self._is_reporting = True

    async def generate(self, request: bytes, *, shun: Sequence[str] = (), prefix: bytes = b"") -> bytes:
        """See router.replica.Router.generate. shun (replicas and nodes) and prefix are for
        cluster.front.router_choice, on the way here."""
        assert self._router is not None, "Serve awaits __init__ first"
        return await self._router.generate(request)

    def engine_stats(self) -> tuple[MemberId, EngineStats | None]:
        """Who this is, and its engine as of the last heartbeat; None before the first."""
        return self._member.member_id, None if self._router is None else self._router.stats

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve where it may change the number of routers; empty before the first heartbeat. For
        cluster.router_autoscaling."""
        stats = None if self._router is None else self._router.stats
        return {} if stats is None else asdict(RouterLoad.of(stats))

    def check_health(self) -> None:
        """Called by Serve; raises when this replica must be replaced, and sees to it that it is.

        Serve would wait for the open calls of an ill replica to end, which they cannot.
        """
        if self._router is None:
            return
        try:
            self._router.check_health()
        except EngineDiedError as error:
            self._leave_with_engine(str(error))
            raise

    def __del__(self) -> None:
        """Called by Serve at the end of a graceful shutdown, and once more by Python."""
        link, self._link = self._link, None
        if link is not None:
            link.leave(self._member)
        router, self._router = self._router, None
        if router is not None:
            router.close()

    def _leave_with_engine(self, reason: str) -> None:
        """A replica without a working engine would draw requests, being the least busy; Serve replaces a dead one at
        once. What is left of the engine ends with us. From any thread; only the first call counts."""
        if self._is_leaving.is_set():
            return
        self._is_leaving.set()
        logger.error("the engine is lost, this replica ends: %s", reason)
        timer = threading.Timer(FAREWELL_S, os._exit, (1,))
        timer.daemon = True
        timer.start()

    def _report(self) -> tuple[Member, MemberReport]:
        if self._router is None:
            return self._member, MemberReport()
        stats, lanes = self._router.stats, self._router.lanes
        is_doubted = self._router.is_doubted
        member = replace(self._member, state=MemberState.SUSPECT) if is_doubted else self._member
        # What an engine said that may have stopped since renews no lease.
        told_lanes = None if lanes.epoch is None or is_doubted else lanes.to_dict()
        if stats is None:
            return member, MemberReport(lanes=told_lanes)
        memory = resident_bytes(self._member.pid)
        metrics = router_snapshot(stats, step_s=self._router.step_s, resident_bytes=memory)
        return member, MemberReport(load=stats.expert_load, metrics=metrics, lanes=told_lanes)

    def _tell_now(self) -> None:
        """A lost shard, a silent engine, a prepared epoch: others wait for it."""
        if self._link is not None and self._is_reporting:
            self._link.report_now()

    def _follow(self, offer: dict[str, Any]) -> None:
        if self._router is not None:
            self._router.follow(EpochOffer(**offer))


def _in_loop(act: Callable[[], None]) -> Callable[[], None]:
    """The same for another thread: act is called in the event loop that runs now."""
    loop = asyncio.get_running_loop()

    def call() -> None:
        try:
            loop.call_soon_threadsafe(act)
        except RuntimeError:
            logger.debug("the replica has ended")

    return call


def _start_message(router_id: str, welcome: dict[str, Any]) -> Start:
    """welcome: as ControlPlane.join_router answers."""
    return Start(
        router_id=router_id,
        settings=engine_settings(parse_config(welcome["config"])),
        secret=welcome["secret"],
        weights_version=welcome["weights_version"],
        epoch=welcome["epoch"],
    )
