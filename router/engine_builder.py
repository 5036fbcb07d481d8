"""From Start to an engine that can take its first request: checkpoint, weights, experts, KV cache."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from experts.checkpoint import Checkpoint
from experts.dispatch import Dispatcher, LocalDispatcher
from experts.epoch import Epoch
from experts.expert_dtype import ExpertDtype
from experts.hub import resolve_model
from experts.lane import LaneDispatcher
from experts.load import ExpertLoad
from experts.memory import free_bytes
from experts.placement import ShardId, Slot
from experts.progress import Progress, log_progress
from experts.shard import Shard
from experts.transport.select import connector
from experts.transport.waiting import wait_policy
from experts.weights import load_slots, validate_experts
from router.capacity import KvCapacity, KvDemand, fitting_capacity, fixed_capacity
from router.config import ModelConfig
from router.engine import Engine
from router.engine_limits import EngineLimits
from router.engine_loop import BuiltEngine
from router.epoch_switch import EpochSwitch
from router.kv_cache import KvCache, KvCacheSpec, KvGroup
from router.messages import EngineSettings, Start
from router.micro_batches import MicroBatching
from router.model import Llama4Model
from router.native.kernels import layer_kernels
from router.weights import load_router, validate_router

logger = logging.getLogger(__name__)

# Of the memory that is free once the weights are loaded. Other routers and shards may share a host's memory; a
# GPU is a router's own, but computing takes some of it.
_KV_SHARE_OF_HOST = 0.25
_KV_SHARE_OF_GPU = 0.85


def build_engine(start: Start, progress: Callable[[str], Progress] | None = None) -> BuiltEngine:
    """Checks everything that can be checked cheaply before reading weights.

    progress makes one for each part that is loaded, "router" or "experts"; by default they are logged. Raises
    ValueError (CheckpointError and ConfigError among them) or OSError naming what is wrong.
    """
    progress = progress or (lambda part: log_progress(logger, part))
    settings = start.settings
    torch.set_num_threads(settings.num_threads)
    dtype, device = getattr(torch, settings.dtype), torch.device(settings.device)
    checkpoint = Checkpoint.open(resolve_model(settings.model))
    config = ModelConfig.from_checkpoint_config(checkpoint.config, checkpoint.generation_config)
    spec = KvCacheSpec(config=config, dtype=dtype, block_size=config.block_size_for(settings.block_size))
    demand = kv_demand(spec, settings)
    validate_router(checkpoint, config)
    if device.type == "cpu":
        # Compiled, or the log says why not, while nobody waits for a token.
        layer_kernels()
    if start.epoch is None:
        validate_experts(checkpoint, config.moe_layers, config.expert_shape)
    weights = load_router(checkpoint, config, dtype=dtype, device=device, progress=progress("router"))
    model = Llama4Model(config, weights)
    experts = _reach_experts(start, checkpoint, config, dtype, device, progress)
    capacity = kv_capacity(demand, settings, device)
    kv_cache = KvCache(
        spec,
        num_global_blocks=capacity.num_global_blocks,
        num_local_blocks=capacity.num_local_blocks,
        device=device,
    )
    engine = Engine(
        model=model,
        kv_cache=kv_cache,
        dispatcher=experts.dispatcher,
        config=config,
        limits=_limits(settings, spec, capacity),
        on_missing_expert=settings.on_missing_expert,
        expert_wait_s=settings.expert_wait_s,
        weights_version=start.weights_version,
        expert_load=experts.load,
        micro_batching=MicroBatching(settings.micro_batches),
    )
    return BuiltEngine(engine=engine, capacity=capacity.describe(demand), close=experts.close, epochs=experts.epochs)


def kv_demand(spec: KvCacheSpec, settings: EngineSettings) -> KvDemand:
    """Raises ValueError for a setting that cannot be met with any memory."""
    return KvDemand(
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        block_size=spec.block_size,
        attention_chunk_size=spec.config.attention_chunk_size,
        global_block_bytes=spec.block_bytes(KvGroup.GLOBAL),
        local_block_bytes=spec.block_bytes(KvGroup.LOCAL),
    )


def kv_capacity(demand: KvDemand, settings: EngineSettings, device: torch.device) -> KvCapacity:
    """Raises ValueError saying what fits in the memory at hand."""
    free = free_bytes(device)
    if settings.num_kv_blocks is not None:
        return fixed_capacity(demand, num_kv_blocks=settings.num_kv_blocks, memory_bytes=free)
    share = settings.kv_memory_share
    if share is None:
        share = _KV_SHARE_OF_GPU if device.type == "cuda" else _KV_SHARE_OF_HOST
    return fitting_capacity(demand, memory_bytes=int(free * share))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Experts:
    """The way to them. load is of experts in this process, epochs of those in shards, which report their own load."""

    dispatcher: Dispatcher
    load: ExpertLoad | None = None
    epochs: EpochSwitch | None = None

    def close(self) -> None:
        if self.epochs is not None:
            self.epochs.close()
        self.dispatcher.close()


def _reach_experts(
    start: Start,
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[str], Progress],
) -> _Experts:
    if start.epoch is not None:
        lanes = LaneDispatcher(
            lane_id=start.router_id,
            epoch=Epoch.from_dict(start.epoch),
            secret=start.secret,
            timeout_s=start.settings.lane_timeout_s,
            silence_s=start.settings.lane_silence_s,
            connect=connector(start.settings.lane_transport),
            wait=wait_policy(start.settings.lane_spin_us),
        )
        logger.info("lanes: %s", ", ".join(f"{shard_id} by {name}" for shard_id, name in lanes.transports.items()))
        _check_step_size(start.settings, config, lanes)
        for shard_id, reason in lanes.lost.items():
            logger.error("%s is lost from the start: %s", shard_id, reason)
        return _Experts(dispatcher=lanes, epochs=EpochSwitch(lanes))
    expert_dtype = ExpertDtype.chosen(start.settings.dtype, start.settings.expert_dtype)
    slots = [Slot(layer, expert) for layer in config.moe_layers for expert in range(config.num_local_experts)]
    shard = Shard(
        shard_id=ShardId(f"{start.router_id}-experts"),
        slots=load_slots(
            checkpoint,
            slots,
            config.expert_shape,
            dtype=dtype,
            device=device,
            quantized=expert_dtype.stored,
            progress=progress("experts"),
        ),
        hidden_size=config.hidden_size,
        dtype=dtype,
        device=device,
        weights_version=start.weights_version,
    )
    return _Experts(dispatcher=LocalDispatcher(shard), load=shard.load)


def _check_step_size(settings: EngineSettings, config: ModelConfig, lanes: LaneDispatcher) -> None:
    """A step that the shards do not take would end the engine in the middle of its work."""
    if lanes.max_rows is None:
        return
    most = lanes.max_rows // config.num_experts_per_tok
    if settings.max_num_batched_tokens > most:
        raise ValueError(
            f"max_num_batched_tokens must be at most {most} with experts in shards, "
            f"not {settings.max_num_batched_tokens}"
        )


def _limits(settings: EngineSettings, spec: KvCacheSpec, capacity: KvCapacity) -> EngineLimits:
    return EngineLimits(
        max_model_len=settings.max_model_len,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_num_seqs=settings.max_num_seqs,
        num_global_blocks=capacity.num_global_blocks,
        num_local_blocks=capacity.num_local_blocks,
        block_size=spec.block_size,
        max_logprobs=settings.max_logprobs,
    )
