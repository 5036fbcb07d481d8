"""All expert shards of the service as one thing: brought up under a first epoch, kept whole, replaced, taken down.

The first epoch is made once every shard has loaded; what changes from then on is the keeper's work.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cluster.config import ServiceConfig
from cluster.control.desired_state import Memory
from cluster.control.epoch_keeper import EpochKeeper
from cluster.control.reconcile import shard_ids
from cluster.control.shard_fleet import ShardFleet, ShardPool
from cluster.control.weight_lines import served_model
from cluster.service_model import read_model_config, resolve
from experts.epoch import Epoch
from experts.expert_dtype import ExpertDtype
from experts.hub import resolve_model
from experts.placement import ExpertPlacement, ShardId, Slot, place
from experts.shard_spec import ShardSpec
from router.config import ModelConfig

logger = logging.getLogger("arriero.controller")

# A start that failed is told to all who ask in this time, and tried anew for who comes later.
REMEMBER_FAILURE_S = 10.0

MakeSpec = Callable[[ShardId, tuple[Slot, ...]], ShardSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The shards serve. keeper: None where routers hold the experts themselves."""

    model: ModelConfig
    keeper: EpochKeeper | None


class ExpertTier:
    """Remembers in ``memory`` which shards there are before it makes them."""

    def __init__(
        self,
        *,
        config: ServiceConfig,
        num_cores: int,
        pool: ShardPool,
        memory: Memory,
        clock: Callable[[], float],
        suspect_after_s: float,
        on_news: Callable[[], None],
        on_death: Callable[[ShardId, str], None],
    ) -> None:
        """suspect_after_s, on_news, on_death: see EpochKeeper."""
        self.config = config
        self._num_cores = num_cores
        self._pool = pool
        self._fleet = ShardFleet(pool, timeout_s=config.start_timeout_s)
        self._suspect_after_s = suspect_after_s
        self._on_news = on_news
        self._on_death = on_death
        self._memory = memory
        self._clock = clock
        self._failed_at_s: float | None = None
        self._bring_up = self._begin()

    @property
    def shard_ids(self) -> tuple[ShardId, ...]:
        return tuple(ShardId(shard_id) for shard_id in self._memory.state.shard_ids)

    @property
    def is_up(self) -> bool:
        return self._bring_up.done() and not self._bring_up.cancelled() and self._bring_up.exception() is None

    @property
    def keeper(self) -> EpochKeeper | None:
        """None before the shards serve, and where there are none."""
        return self._bring_up.result().keeper if self.is_up else None

    @property
    def epoch(self) -> Epoch:
        """The one in force; only once ``started`` has returned."""
        epoch = self._epoch_in_force()
        assert epoch is not None
        return epoch

    async def started(self) -> Started:
        """Returns once all shards serve. Raises StartError, OSError or ValueError when they cannot."""
        if self._failed_at_s is not None and self._clock() - self._failed_at_s > REMEMBER_FAILURE_S:
            self._bring_up = self._begin()
        return await asyncio.shield(self._bring_up)

    async def replace(self, config: ServiceConfig) -> None:
        """Takes the shards down and begins to bring up those of another configuration, whose weights are another
        version."""
        await self.remove(drain_timeout_s=0.0)
        self.config = config
        version = self._memory.state.last_version + 1
        await self._memory.change(
            config=config.model_dump(),
            weights_version=version,
            last_version=version,
            model=None,
            update=None,
            least_shards=None,
        )
        self._bring_up = self._begin()

    async def remove(self, *, drain_timeout_s: float) -> None:
        if self.keeper is not None:
            await self.keeper.stop()
        self._bring_up.cancel()
        await asyncio.wait([self._bring_up])
        await self._remove_shards(drain_timeout_s)

    def _begin(self) -> asyncio.Task[Started]:
        self._failed_at_s = None
        task = asyncio.create_task(self._run())
        # Whoever asks gets the failure; when nobody does, it is not one that was overlooked.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return task

    async def _run(self) -> Started:
        try:
            return await self._start()
        except Exception as error:
            logger.error("start failed: %s", error)
            await self._remove_shards(drain_timeout_s=0.0)
            self._failed_at_s = self._clock()
            raise

    async def _start(self) -> Started:
        folder = await asyncio.to_thread(resolve_model, served_model(self._memory.state))
        model = await asyncio.to_thread(read_model_config, Path(folder))
        config = resolve(self.config, model, self._num_cores)
        make_spec = partial(self._spec, config, model)
        if self._epoch_in_force() is None:
            await self._make_first_epoch(config, model, make_spec)
        # Else an earlier controller has got that far: what has changed meanwhile is for the keeper to find.
        return Started(model=model, keeper=self._make_keeper(make_spec) if self.shard_ids else None)

    async def _make_first_epoch(self, config: ServiceConfig, model: ModelConfig, make_spec: MakeSpec) -> None:
        if not self.shard_ids:
            await self._memory.change(shard_ids=shard_ids(config.shards, secrets.token_hex(3)))
        placement = self._place(model)
        slots_by_shard = placement.slots_by_shard
        addresses = await self._fleet.load(
            {shard_id: make_spec(shard_id, slots_by_shard[shard_id]) for shard_id in self.shard_ids}
        )
        number = self._memory.state.last_epoch + 1
        epoch = Epoch(
            number=number, weights_version=self._memory.state.weights_version, shards=addresses, placement=placement
        )
        # Before any shard hears of it, so that its number is never given again.
        await self._memory.change(epoch=epoch.to_dict(), last_epoch=number, target=dict(slots_by_shard))
        await self._fleet.open(
            epoch, self.shard_ids, term=self._memory.state.term, model=served_model(self._memory.state)
        )
        logger.info("epoch %d: %d shards serve", epoch.number, len(addresses))

    def _make_keeper(self, make_spec: MakeSpec) -> EpochKeeper:
        return EpochKeeper(
            memory=self._memory,
            pool=self._pool,
            make_spec=make_spec,
            clock=self._clock,
            timeout_s=self.config.start_timeout_s,
            stall_s=self.config.rebalance_stall_s,
            suspect_after_s=self._suspect_after_s,
            on_news=self._on_news,
            on_death=self._on_death,
        )

    def _epoch_in_force(self) -> Epoch | None:
        known = self._memory.state.epoch
        return None if known is None else Epoch.from_dict(known)

    def _place(self, model: ModelConfig) -> ExpertPlacement:
        if not self.shard_ids:
            return ExpertPlacement(slots_by_shard={})
        return place(
            moe_layers=model.moe_layers,
            num_experts=model.num_local_experts,
            shard_ids=self.shard_ids,
            copies=self.config.copies,
        )

    def _spec(self, config: ServiceConfig, model: ModelConfig, shard_id: ShardId, slots: tuple[Slot, ...]) -> ShardSpec:
        return ShardSpec(
            shard_id=shard_id,
            slots=slots,
            model=served_model(self._memory.state),
            shape=model.expert_shape,
            dtype=config.dtype,
            quantized=ExpertDtype.chosen(config.dtype, config.expert_dtype).stored,
            device=config.device,
            num_threads=config.shard_threads or 1,
            lane_spin_us=config.lane_spin_us,
            secret=self._memory.state.secret,
            weights_version=self._memory.state.weights_version,
            log=config.log_settings,
        )

    async def _remove_shards(self, drain_timeout_s: float) -> None:
        await self._fleet.remove(self.shard_ids, drain_timeout_s=drain_timeout_s)
        await self._memory.change(shard_ids=(), target={}, epoch=None, preparing=None, other=None)
