"""A member's line to the controller: finds or makes it, joins, reports twice a second, leaves.

The replica that starts first makes the controller, so that an application put up by `serve deploy` alone has one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from cluster.config import ServiceConfig
from cluster.control.control_plane import RetiringError
from cluster.control.controller import Controller
from cluster.control.member_report import MemberReport
from cluster.control.membership import Member
from cluster.control.shard_pool import NAMESPACE
from cluster.metrics.merge import ServiceNumbers

logger = logging.getLogger("arriero.link")

RETRY_S = 0.2
ANSWER_TIMEOUT_S = 10.0
# The controller's own deadlines come first: its answer names the culprit.
JOIN_MARGIN_S = 30.0

Report = Callable[[], tuple[Member, MemberReport]]
OnOffer = Callable[[dict[str, Any]], None]
OnWeights = Callable[[dict[str, Any]], None]


def controller_name(app_name: str) -> str:
    return f"{app_name}:controller"


def find_or_make_controller(config: ServiceConfig) -> ActorHandle[Any]:
    """Blocks for a few milliseconds."""
    actor_class: Any = ray.remote(num_cpus=0, max_restarts=-1)(Controller)
    handle: ActorHandle[Any] = actor_class.options(
        name=controller_name(config.app_name), namespace=NAMESPACE, lifetime="detached", get_if_exists=True
    ).remote(config.model_dump())
    return handle


def find_controller(app_name: str) -> ActorHandle[Any] | None:
    try:
        return ray.get_actor(controller_name(app_name), namespace=NAMESPACE)
    except ValueError:
        return None


class ControllerLink:
    """Used by one member, within its Serve replica and in one event loop. Join first."""

    def __init__(self, config: ServiceConfig) -> None:
        """Serve's own name for the application counts: by it the controller tells whether that is still there."""
        app_name = serve.get_replica_context().app_name
        if app_name != config.app_name:
            logger.info("app_name is %r, as in Serve, and not %r", app_name, config.app_name)
        self._config = config.model_copy(update={"app_name": app_name})
        self._controller: ActorHandle[Any] | None = None
        self._reporter: asyncio.Task[None] | None = None
        self._is_answered = True
        self.num_ready_routers = 0
        self.draining_nodes: list[str] = []

    async def join_router(self, member: Member, weights_version: int | None = None) -> dict[str, Any]:
        """See ControlPlane.join_router. Raises what that raises, TimeoutError, RayError."""
        timeout_s = self._config.start_timeout_s + JOIN_MARGIN_S
        config = self._config.model_dump()
        return await self._join("join_router", member, config, weights_version, timeout_s=timeout_s)

    async def join_gateway(self, member: Member) -> dict[str, Any]:
        """See ControlPlane.join_gateway."""
        return await self._join("join_gateway", member, timeout_s=self._config.drain_timeout_s + JOIN_MARGIN_S)

    def start_reporting(self, report: Report, on_weights: OnWeights, on_offer: OnOffer | None = None) -> None:
        """From now on the controller hears of this member every heartbeat_s, and whenever report_now is called; what
        it tells of weights versions (Updating.versions_told) goes to on_weights, what it offers about epochs to
        on_offer."""
        self._report = report
        self._on_weights = on_weights
        self._on_offer = on_offer
        self._term = 0
        self._due = asyncio.Event()
        self._reporter = asyncio.create_task(self._report_for_ever())

    def report_now(self) -> None:
        self._due.set()

    async def refresh(self, timeout_s: float) -> None:
        """Reports now and takes the answer. Raises TimeoutError, RayError."""
        async with asyncio.timeout(timeout_s):
            await self._report_once()

    async def get_view(self, timeout_s: float) -> dict[str, Any]:
        """Raises TimeoutError, RayError."""
        assert self._controller is not None, "join first"
        async with asyncio.timeout(timeout_s):
            view: dict[str, Any] = await self._controller.get_view.remote()
        return view

    async def get_numbers(self, timeout_s: float) -> ServiceNumbers | None:
        """See ControlPlane.numbers; this member's are as of now. Raises TimeoutError, RayError."""
        assert self._controller is not None, "join first"
        async with asyncio.timeout(timeout_s):
            await self._report_once()
            numbers: ServiceNumbers | None = await self._controller.get_numbers.remote()
        return numbers

    async def get_open_choices(self, timeout_s: float, *, at_most: int) -> dict[str, Any]:
        """See ControlPlane.open_choices; of this member as of now. Raises TimeoutError, RayError."""
        assert self._controller is not None, "join first"
        async with asyncio.timeout(timeout_s):
            await self._report_once()
            found: dict[str, Any] = await self._controller.get_open_choices.remote(at_most)
        return found

    async def scale_shards(self, num_shards: int, timeout_s: float) -> dict[str, Any]:
        """See Controller.scale_shards. Raises TimeoutError, RayError."""
        assert self._controller is not None, "join first"
        async with asyncio.timeout(timeout_s):
            answer: dict[str, Any] = await self._controller.scale_shards.remote(num_shards)
        return answer

    async def rebalance(self, timeout_s: float, *, dry_run: bool) -> dict[str, Any]:
        """See Rebalancing.rebalance. Raises TimeoutError, RayError."""
        assert self._controller is not None, "join first"
        async with asyncio.timeout(timeout_s):
            outcome: dict[str, Any] = await self._controller.rebalance.remote(dry_run)
        return outcome

    async def get_rebalance(self, timeout_s: float, *, rebalance_id: str) -> dict[str, Any] | None:
        """See Rebalancing.progress. Raises TimeoutError, RayError."""
        assert self._controller is not None, "join first"
        async with asyncio.timeout(timeout_s):
            progress: dict[str, Any] | None = await self._controller.get_rebalance.remote(rebalance_id)
        return progress

    async def update_weights(self, timeout_s: float, *, model: str, dry_run: bool) -> dict[str, Any]:
        """See Controller.update_weights. Raises TimeoutError, RayError."""
        assert self._controller is not None, "join first"
        async with asyncio.timeout(timeout_s):
            answer: dict[str, Any] = await self._controller.update_weights.remote(model, dry_run)
        return answer

    async def get_update(self, timeout_s: float, *, update_id: str) -> dict[str, Any] | None:
        """See Updating.progress. Raises TimeoutError, RayError."""
        assert self._controller is not None, "join first"
        async with asyncio.timeout(timeout_s):
            progress: dict[str, Any] | None = await self._controller.get_update.remote(update_id)
        return progress

    def leave(self, member: Member) -> None:
        """The member ends as it should. Does not wait."""
        if self._reporter is not None:
            self._reporter.cancel()
        if self._controller is not None:
            last = None if self._reporter is None else self._report()[1]
            self._controller.leave.remote(member.member_id, last)

    async def _join(self, method: str, member: Member, *arguments: Any, timeout_s: float) -> dict[str, Any]:
        """Tries again while one controller goes and the next one comes."""
        process = ray.get_runtime_context().current_actor
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    self._controller = await asyncio.to_thread(find_or_make_controller, self._config)
                    welcome: dict[str, Any] = await getattr(self._controller, method).remote(
                        member, process, *arguments
                    )
                except (RetiringError, ActorDiedError, ActorUnavailableError) as error:
                    logger.info("%s: %s; trying again", method, type(error).__name__)
                    await asyncio.sleep(RETRY_S)
                else:
                    return welcome

    async def _report_for_ever(self) -> None:
        while True:
            try:
                await self.refresh(ANSWER_TIMEOUT_S)
                self._note_answer(None)
            except ActorDiedError:
                # Not one that Ray starts again: somebody has killed it for good.
                logger.warning("the controller is gone: looking for it, or making another")
                self._controller = await asyncio.to_thread(find_or_make_controller, self._config)
            except (RayError, TimeoutError) as error:
                self._note_answer(error)
            await self._until_due()

    def _note_answer(self, error: Exception | None) -> None:
        """One line when the controller falls silent, one when it speaks again."""
        if (error is None) == self._is_answered:
            return
        self._is_answered = error is None
        if error is None:
            logger.warning("the controller answers again")
        else:
            logger.warning("the controller does not answer (%s): serving goes on", type(error).__name__)

    async def _report_once(self) -> None:
        assert self._controller is not None, "join first"
        member, report = self._report()
        answer = await self._controller.heartbeat.remote(member, report)
        if not answer["known"]:
            # The controller was reborn and learns of us here.
            await self._controller.take_in.remote(member, ray.get_runtime_context().current_actor, report)
        self.num_ready_routers = answer["num_ready_routers"]
        self.draining_nodes = answer["draining_nodes"]
        # A lower term: a controller that another one has succeeded.
        if answer["term"] < self._term:
            return
        self._term = answer["term"]
        self._on_weights(answer["weights"])
        if "offer" in answer and self._on_offer is not None:
            self._on_offer(answer["offer"])

    async def _until_due(self) -> None:
        try:
            async with asyncio.timeout(self._config.heartbeat_s):
                await self._due.wait()
        except TimeoutError:
            pass
        self._due.clear()
