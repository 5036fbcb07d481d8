"""The controller as a Ray actor: it only forwards to control_plane.py, and ends itself when that is done."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from typing import Any

import ray

from cluster.config import ServiceConfig, parse_config
from cluster.control.control_plane import ControlPlane, RetiringError
from cluster.control.draining_nodes import MustMoveError
from cluster.control.kv_store import KvStore
from cluster.control.member_report import MemberReport
from cluster.control.membership import Member, MemberId, MemberKind, MemberState
from cluster.control.outside import Outside
from cluster.control.ray_nodes import RayNodes
from cluster.control.serve_apps import ServeApps
from cluster.control.shard_pool import RayShardPool
from cluster.control.updating import UpdateRefusedError
from cluster.launch.ray_probe import RayProbe
from cluster.launch.token_file import ServiceRecord, remove_record, state_folder, write_record
from cluster.metrics.merge import ServiceNumbers
from experts.logs import configure_logging

logger = logging.getLogger("arriero.controller")

PROBE_TIMEOUT_S = 1.0
SERVE_TIMEOUT_S = 5.0
NODES_TIMEOUT_S = 5.0


class Controller:
    """Every method waits until the control plane stands. ``config`` is a ServiceConfig as a plain dict."""

    def __init__(self, config: dict[str, Any]) -> None:
        service = parse_config(config)
        configure_logging(service.log_settings, process="controller")
        self._record: ServiceRecord | None = None
        self._plane = asyncio.create_task(self._start(service))
        self._life = asyncio.create_task(self._live())

    async def join_router(
        self, member: Member, process: Any, config: dict[str, Any], weights_version: int | None
    ) -> dict[str, Any]:
        return await (await self._plane).join_router(member, process, config, weights_version)

    async def join_gateway(self, member: Member, process: Any) -> dict[str, Any]:
        return (await self._plane).join_gateway(member, process)

    async def heartbeat(self, member: Member, report: MemberReport) -> dict[str, Any]:
        return (await self._plane).heartbeat(member, report)

    async def take_in(self, member: Member, process: Any, report: MemberReport) -> None:
        (await self._plane).take_in(member, process, report)

    async def leave(self, member_id: MemberId, report: MemberReport | None) -> None:
        (await self._plane).leave(member_id, report)

    async def get_numbers(self) -> ServiceNumbers | None:
        return (await self._plane).numbers()

    async def get_open_choices(self, at_most: int) -> dict[str, Any]:
        return (await self._plane).open_choices(at_most)

    async def scale_shards(self, num_shards: int) -> dict[str, Any]:
        """shard_ids: those that are wanted from now on; or refusal: why not."""
        try:
            return {"shard_ids": await (await self._plane).scale_shards(num_shards)}
        except (ValueError, RetiringError) as error:
            return {"refusal": str(error)}

    async def get_view(self) -> dict[str, Any]:
        return (await self._plane).view()

    async def rebalance(self, dry_run: bool) -> dict[str, Any]:
        return await (await self._plane).rebalancing.rebalance(dry_run=dry_run)

    async def get_rebalance(self, rebalance_id: str) -> dict[str, Any] | None:
        return (await self._plane).rebalancing.progress(rebalance_id)

    async def update_weights(self, model: str, dry_run: bool) -> dict[str, Any]:
        """See Updating.begin; or refusal: why not, is_input: whether it is the model that is wrong, and rooms."""
        try:
            return await (await self._plane).updating.begin(model, dry_run=dry_run)
        except UpdateRefusedError as error:
            return {"refusal": str(error), "is_input": False, "rooms": [room.to_dict() for room in error.rooms]}
        except (ValueError, OSError) as error:
            return {"refusal": str(error), "is_input": True, "rooms": []}

    async def get_update(self, update_id: str) -> dict[str, Any] | None:
        return (await self._plane).updating.progress(update_id)

    async def retire(self) -> None:
        """Returns once shards and groups are gone; the actor ends right after."""
        await (await self._plane).retire()

    async def _start(self, config: ServiceConfig) -> ControlPlane:
        context = ray.get_runtime_context()
        me = Member(
            member_id=MemberId(f"controller-{secrets.token_hex(3)}"),
            kind=MemberKind.CONTROLLER,
            pid=os.getpid(),
            node_id=context.get_node_id(),
            state=MemberState.READY,
        )
        num_gpus = 1.0 if config.device == "cuda" else 0.0
        self._apps = ServeApps(SERVE_TIMEOUT_S)
        outside = Outside(
            store=KvStore(config.app_name),
            apps=self._apps,
            pool=RayShardPool(app_name=config.app_name, num_cpus=config.shard_num_cpus, num_gpus=num_gpus),
            probe=RayProbe(PROBE_TIMEOUT_S),
            nodes=RayNodes(NODES_TIMEOUT_S),
        )
        num_cores = len(os.sched_getaffinity(0))
        plane = await ControlPlane.start(config=config, me=me, num_cores=num_cores, outside=outside)
        await self._write_record(config, plane)
        return plane

    async def _write_record(self, config: ServiceConfig, plane: ControlPlane) -> None:
        """Serve's own ports count: those of a service set up by `serve deploy` stand in its file, not in ours."""
        http_port, grpc_port = await self._apps.ports() or (config.http_port, config.grpc_port)
        self._record = ServiceRecord(
            app_name=config.app_name,
            admin_token=plane.state.admin_token,
            grpc_address=f"127.0.0.1:{grpc_port}",
            http_address=f"127.0.0.1:{http_port}",
            started_at=time.time(),
        )
        path = write_record(self._record, state_folder())
        logger.info("addresses and admin token are in %s", path)

    async def _live(self) -> None:
        try:
            await (await self._plane).run()
        except MustMoveError as error:
            logger.warning("the controller moves to another node: %s", error)
            os._exit(1)
        except Exception:
            # Ray starts this actor again, in a new term.
            logger.exception("the controller failed")
            os._exit(1)
        if self._record is not None:
            remove_record(self._record, state_folder())
        logger.info("the service is gone; the controller ends")
        await asyncio.to_thread(ray.kill, ray.get_runtime_context().current_actor, no_restart=True)
