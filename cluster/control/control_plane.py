"""The controller's mind: knows who belongs to the service, brings its experts up, takes everything down.

No Ray in here. Gateways and routers join and then report; shards are asked. Every half second each process is
looked at, so that a dead one is seen as dead within two seconds. Once a second Serve is asked for our
application: when that has been gone for long enough, the service is removed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cluster.config import ServiceConfig, parse_config
from cluster.control.desired_state import DesiredState, Memory
from cluster.control.draining_nodes import DrainingNodes
from cluster.control.expert_tier import ExpertTier
from cluster.control.load_ledger import LoadLedger
from cluster.control.member_report import MemberReport
from cluster.control.membership import Member, MemberId, MemberKind, Membership
from cluster.control.outside import Outside
from cluster.control.rebalancing import Rebalancing
from cluster.control.reconcile import AppWatch, shard_changes
from cluster.control.report_book import ReportBook
from cluster.control.shard_care import ShardCare
from cluster.control.shard_fleet import ShardReport
from cluster.control.shard_watch import ShardWatch
from cluster.control.updating import Updating
from cluster.control.weight_lines import served_model
from cluster.metrics.member_snapshots import controller_snapshot
from cluster.metrics.merge import ServiceNumbers
from cluster.service_model import resolve
from experts.placement import ShardId
from experts.process_memory import resident_bytes

logger = logging.getLogger("arriero.controller")

SUSPECT_AFTER_HEARTBEATS = 4
FORGET_DEAD_AFTER_S = 60.0
APP_WATCH_PERIOD_S = 1.0


class RetiringError(RuntimeError):
    """This service is being removed: whoever wants to join must wait for the next controller."""


class ControlPlane:
    """Make one with ``start``. All methods belong to one event loop."""

    def __init__(self, *, config: ServiceConfig, me: Member, num_cores: int, outside: Outside, memory: Memory) -> None:
        self._me = me
        self._num_cores = num_cores
        self._outside = outside
        self._memory = memory
        self._membership = Membership(
            suspect_after_s=SUSPECT_AFTER_HEARTBEATS * config.heartbeat_s, forget_dead_after_s=FORGET_DEAD_AFTER_S
        )
        self._ledger = LoadLedger()
        self._reports = ReportBook(memory.state.departed)
        # A controller that is reborn does not know at once what its members have counted.
        gathering_s = SUSPECT_AFTER_HEARTBEATS * config.heartbeat_s if memory.state.term > 1 else 0.0
        self._all_known_at_s = outside.clock() + gathering_s
        self._processes: dict[MemberId, Any] = {}
        self._app_watch = AppWatch(gone_after_s=config.app_gone_s)
        self._news = asyncio.Event()
        self._tier = ExpertTier(
            config=config,
            num_cores=num_cores,
            pool=outside.pool,
            memory=memory,
            clock=outside.clock,
            suspect_after_s=SUSPECT_AFTER_HEARTBEATS * config.heartbeat_s,
            on_news=self._news.set,
            on_death=lambda shard_id, reason: self._note_death(MemberId(shard_id), reason),
        )
        self._care = ShardCare(self._tier, memory, num_cores=num_cores, clock=outside.clock)
        self._draining = DrainingNodes(outside.nodes, self._tier, my_node_id=me.node_id)
        self._updating = Updating(
            tier=self._tier,
            memory=memory,
            members=self._members,
            num_cores=num_cores,
            clock=outside.clock,
            all_known_at_s=self._all_known_at_s,
            on_news=self._news.set,
        )
        self._watch = ShardWatch(
            tier=self._tier,
            pool=outside.pool,
            membership=self._membership,
            clock=outside.clock,
            timeout_s=SUSPECT_AFTER_HEARTBEATS * config.heartbeat_s,
            on_report=self._take_shard_report,
            on_leave=self.leave,
        )
        self._retired = asyncio.Event()
        self._retiring = False
        self._changing_tier = asyncio.Lock()

    @classmethod
    async def start(cls, *, config: ServiceConfig, me: Member, num_cores: int, outside: Outside) -> ControlPlane:
        """Takes a new term. A service that was there before goes on with the configuration it has."""
        memory = await Memory.open(outside.store, config.model_dump())
        running = parse_config(memory.state.config)
        return cls(config=running, me=me, num_cores=num_cores, outside=outside, memory=memory)

    @property
    def state(self) -> DesiredState:
        return self._memory.state

    async def join_router(
        self, member: Member, process: Any, config: Mapping[str, Any], weights_version: int | None = None
    ) -> dict[str, Any]:
        """Answers once all shards serve: secret, term, epoch (None when routers hold the experts), the weights
        version, and config with what the checkpoint and this machine decide filled in.

        process is what the probe takes. weights_version: the router's; None for what new requests get. Raises
        StartError when the shards cannot start, ValueError when others are up than config needs or the version is not
        served, RetiringError.
        """
        wanted = parse_config(config)
        await self._adapt_to(wanted)
        self.take_in(member, process)
        started = await self._tier.started()
        await self._watch.look_at_all()
        line = self._updating.line_for_router(weights_version)
        with_its_model = wanted.model_copy(update={"model": line.model})
        return {
            "secret": self.state.secret,
            "term": self.state.term,
            "epoch": line.epoch if started.keeper is not None else None,
            "weights_version": line.weights_version,
            "config": resolve(with_its_model, started.model, self._num_cores).model_dump(),
        }

    def join_gateway(self, member: Member, process: Any) -> dict[str, Any]:
        """Answers at once: secret, term, admin_token, weights as in a heartbeat's answer, and the model."""
        self._check_not_retiring()
        self.take_in(member, process)
        return {
            "secret": self.state.secret,
            "term": self.state.term,
            "admin_token": self.state.admin_token,
            "weights": self._updating.versions_told(),
            "model": served_model(self.state),
        }

    def take_in(self, member: Member, process: Any, report: MemberReport | None = None) -> None:
        """Knows the member from now on. process is what the probe takes."""
        if self._membership.report(member, self._now()):
            self._processes[member.member_id] = process
            if report is not None:
                self._take(member.member_id, report)

    def heartbeat(self, member: Member, report: MemberReport) -> dict[str, Any]:
        """known is False for a member that this controller has not met: it should call take_in. weights: see
        Updating.versions_told. A router that tells of its lanes gets an offer, as router.lane_state.EpochOffer takes
        it, as long as its version is served."""
        known = member.member_id in self._membership
        if known and self._membership.report(member, self._now()):
            self._take(member.member_id, report)
        num_ready = self._membership.num_ready(MemberKind.ROUTER, self._now())
        answer: dict[str, Any] = {"known": known, "term": self.state.term, "num_ready_routers": num_ready}
        answer["weights"] = self._updating.versions_told()
        answer["draining_nodes"] = self._draining.ids
        if report.lanes is not None and self._tier.keeper is not None:
            self._tier.keeper.note_router(member.member_id, report.weights_version, report.lanes)
            offer = self._tier.keeper.offer(member.member_id, report.weights_version)
            answer |= {} if offer is None else {"offer": offer}
        return answer

    def leave(self, member_id: MemberId, report: MemberReport | None = None) -> None:
        """The member ends as it should; report: its last."""
        if report is not None and member_id in self._membership:
            self._take(member_id, report)
        self._membership.leave(member_id)
        self._forget(member_id)

    def numbers(self) -> ServiceNumbers | None:
        """For metrics. None while a reborn controller has not heard of everybody yet."""
        if self._now() < self._all_known_at_s:
            return None
        numbers = self._reports.numbers()
        epoch = self.state.epoch
        numbers.living[str(self._me.member_id)] = controller_snapshot(
            epoch=epoch["number"] if epoch else 0,
            members=[self._me, *(member for kind in MemberKind for member in self._members(kind))],
            imbalance=self._ledger.imbalance(),
            growth=self._care.growth.growth,
            resident_bytes=resident_bytes(),
        )
        return numbers

    def open_choices(self, at_most: int) -> dict[str, Any]:
        """What AdminService.ListRequests tells: the oldest open choices of all gateways, as of their last reports."""
        num_open, oldest = self._reports.open_choices(self._now(), at_most=at_most)
        return {"num_open": num_open, "choices": [{**asdict(choice), "gateway_id": str(who)} for who, choice in oldest]}

    async def scale_shards(self, num_shards: int) -> tuple[ShardId, ...]:
        """Wants so many shards from now on, and returns their names; the view shows how it comes about.

        Raises ValueError for a number that cannot be, or while there is nothing to scale; RetiringError.
        """
        async with self._changing_tier:
            self._check_not_retiring()
            return await self._care.growth.scale(num_shards)

    def view(self) -> dict[str, Any]:
        """What `arriero status --json` prints."""
        epoch = self.state.epoch
        return {
            "epoch": epoch["number"] if epoch else 0,
            "controller": self._me.to_dict(),
            "gateways": [member.to_dict() for member in self._members(MemberKind.GATEWAY)],
            "routers": [member.to_dict() for member in self._members(MemberKind.ROUTER)],
            "shards": [
                {**member.to_dict(), "slots": epoch["slots_by_shard"].get(member.member_id, []) if epoch else []}
                for member in self._members(MemberKind.SHARD)
            ],
            "shard_growth": self._care.growth.growth.to_dict(),
            "load": [list(entry) for entry in self._ledger.totals()],
            "weights_version": self.state.weights_version,
            "model": served_model(self.state),
            "update": self._updating.progress(""),
        }

    @property
    def updating(self) -> Updating:
        return self._updating

    @property
    def rebalancing(self) -> Rebalancing:
        return self._care.rebalancing

    async def run(self) -> None:
        """Looks at everybody until the service has been removed. Raises what keeps it from that."""
        keeping = (self._keep_shards(), *self._care.work(), self._draining.watch_for_ever())
        work = (*keeping, self._look_at_processes_for_ever(), self._watch_app(), self._retired.wait())
        tasks = [asyncio.create_task(each) for each in work]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not self._retired.is_set():
                await done.pop()
                await self._retired.wait()
        finally:
            for task in tasks:
                task.cancel()

    async def retire(self) -> None:
        """Drains and removes the shards and forgets the service; then ``run`` returns."""
        if self._retiring:
            await self._retired.wait()
            return
        self._retiring = True
        async with self._changing_tier:
            await self._tier.remove(drain_timeout_s=self._tier.config.drain_timeout_s)
        await self._memory.erase()
        self._retired.set()

    def _check_not_retiring(self) -> None:
        if self._retiring:
            raise RetiringError(f"the service {self._tier.config.app_name!r} is being removed")

    async def _adapt_to(self, wanted: ServiceConfig) -> None:
        """Puts up other shards when the application came back configured anew and nobody uses the old ones.

        Raises ValueError when somebody does, RetiringError.
        """
        async with self._changing_tier:
            self._check_not_retiring()
            changes = shard_changes(self._tier.config, wanted, served_model(self.state))
            if not changes:
                return
            names = ", ".join(changes)
            if self._membership.num_ready(MemberKind.ROUTER, self._now()):
                raise ValueError(f"the service runs with other values of {names}: delete the application first")
            logger.info("configured anew (%s): the shards are replaced", names)
            await self._tier.replace(wanted)
            self._care.begin_anew()

    def _members(self, kind: MemberKind) -> tuple[Member, ...]:
        return tuple(self._draining.shown(member) for member in self._membership.of_kind(kind, self._now()))

    def _take(self, member_id: MemberId, report: MemberReport) -> None:
        self._reports.take(member_id, report, self._now())
        self._updating.note(member_id, report)
        if report.load:
            self._ledger.report(member_id, report.load)

    def _take_shard_report(self, shard_id: ShardId, report: ShardReport) -> None:
        self._take(MemberId(shard_id), MemberReport(load=list(report.load), metrics=report.metrics))
        self._care.note(shard_id, report)
        self._updating.note_shard(shard_id, report)

    def _note_death(self, member_id: MemberId, reason: str) -> None:
        if self._membership.mark_dead(member_id, self._now()):
            logger.error("%s died: %s", member_id, reason)
            self._reports.close(member_id)

    def _forget(self, member_id: MemberId) -> None:
        self._processes.pop(member_id, None)
        self._ledger.close(member_id)
        self._reports.close(member_id)
        self._care.forget(ShardId(member_id))
        self._updating.forget(member_id)
        self._end_lease(member_id)

    def _end_lease(self, member_id: MemberId) -> None:
        """The process behind the member has ended: no epoch needs to be kept for it."""
        if self._tier.keeper is not None:
            self._tier.keeper.forget_router(member_id)

    def _now(self) -> float:
        return self._outside.clock()

    async def _keep_shards(self) -> None:
        """Looks at all shards every heartbeat, and acts then and whenever something is new."""
        while True:
            self._watch.begin()
            if self._tier.keeper is not None:
                await self._tier.keeper.act()
                await self._updating.act()
            try:
                async with asyncio.timeout(self._tier.config.heartbeat_s):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()

    async def _look_at_processes_for_ever(self) -> None:
        while True:
            await asyncio.gather(*(self._look_at_process(*entry) for entry in list(self._processes.items())))
            for member_id in self._membership.forget_old_dead(self._now()):
                self._forget(member_id)
            if self._reports.departed is not self.state.departed:
                await self._memory.change(departed=self._reports.departed)
            await asyncio.sleep(self._tier.config.heartbeat_s)

    async def _watch_app(self) -> None:
        while not self._retiring:
            present = await self._outside.apps.is_present(self._tier.config.app_name)
            if self._app_watch.note(present=present, now_s=self._now()):
                logger.info("the application is gone from Serve: removing its shards")
                await self.retire()
            await asyncio.sleep(APP_WATCH_PERIOD_S)

    async def _look_at_process(self, member_id: MemberId, process: Any) -> None:
        if await self._outside.probe.has_died(process):
            self._note_death(member_id, "its process has ended")
            self._end_lease(member_id)
