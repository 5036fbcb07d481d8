"""One router of one weights version: joins the service, runs a router.replica.Router, reports, leaves."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.config import ServiceConfig, parse_config
from cluster.control.controller_link import ControllerLink
from cluster.control.member_report import MemberReport
from cluster.control.membership import Member, MemberId, MemberKind, MemberState
from cluster.engine_settings import engine_settings
from cluster.metrics.member_snapshots import router_snapshot
from experts.host_memory import free_host_bytes
from experts.process_memory import resident_bytes
from router.lane_state import EpochOffer
from router.messages import Start
from router.replica import Router, RouterTimeouts

logger = logging.getLogger("arriero.router")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaHooks:
    """The Serve replica that a member lives in. on_death hears, from another thread, why a ready engine has ended;
    on_weights what the controller tells of versions; failed_versions: what the replica could not start, and why."""

    name: str
    node_id: str
    on_death: Callable[[str], None]
    on_weights: Callable[[dict[str, Any]], None]
    failed_versions: Callable[[], Mapping[int, str]]


class RouterMember:
    """Made by ``start``."""

    def __init__(self, service: ServiceConfig, hooks: ReplicaHooks) -> None:
        self._hooks = hooks
        self._service = service
        self._router: Router | None = None
        self._link = ControllerLink(service)
        self._is_reporting = False
        self.num_open = 0
        self.member = Member(
            member_id=MemberId(f"router-{secrets.token_hex(3)}"),
            kind=MemberKind.ROUTER,
            pid=0,
            node_id=hooks.node_id,
            state=MemberState.STARTING,
        )
        self.weights_version = 0

    async def start(self, weights_version: int | None = None) -> None:
        """Returns when the engine serves. weights_version: None for what new requests get. Raises what keeps it from
        that; the service has then forgotten the member."""
        try:
            await self._start(weights_version)
        except BaseException:
            self._link.leave(self.member)
            raise

    async def _start(self, weights_version: int | None) -> None:
        welcome = await self._link.join_router(self.member, weights_version)
        self.weights_version = welcome["weights_version"]
        self._router = Router(
            timeouts=RouterTimeouts(start_s=self._service.start_timeout_s),
            on_death=self._hooks.on_death,
            on_lanes=_in_loop(self.report_now),
            on_doubt=self.report_now,
            name=self._hooks.name,
        )
        ready = await self._router.start(_start_message(self.member.member_id, welcome))
        self.member = replace(self.member, pid=ready.pid, state=MemberState.READY)
        self._link.start_reporting(self._report, self._hooks.on_weights, self._follow)
        self._is_reporting = True

    @property
    def router(self) -> Router:
        """Only once it has started."""
        assert self._router is not None, "start first"
        return self._router

    async def generate(self, request: bytes) -> bytes:
        """See router.replica.Router.generate."""
        self.num_open += 1
        try:
            return await self.router.generate(request)
        finally:
            self.num_open -= 1

    def close(self) -> None:
        """Leaves the service and ends the engine; blocks until that is gone."""
        self._link.leave(self.member)
        if self._router is not None:
            self._router.close()

    def report_now(self) -> None:
        """A lost shard, a silent engine, a prepared epoch: others wait for it."""
        if self._is_reporting:
            self._link.report_now()

    def _report(self) -> tuple[Member, MemberReport]:
        stats, lanes, is_doubted = self.router.stats, self.router.lanes, self.router.is_doubted
        member = replace(self.member, state=MemberState.SUSPECT) if is_doubted else self.member
        memory = resident_bytes(self.member.pid)
        report = MemberReport(
            # What an engine said that may have stopped since renews no lease.
            lanes=None if lanes.epoch is None or is_doubted else lanes.to_dict(),
            weights_version=self.weights_version,
            replica=self._hooks.name,
            failed_versions=dict(self._hooks.failed_versions()),
            resident_bytes=memory,
            num_free_bytes=free_host_bytes(),
        )
        if stats is None:
            return member, report
        metrics = router_snapshot(stats, step_s=self.router.step_s, resident_bytes=memory)
        return member, replace(report, load=stats.expert_load, metrics=metrics)

    def _follow(self, offer: dict[str, Any]) -> None:
        self.router.follow(EpochOffer(**offer))


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
