"""What an engine is told of the service's configuration."""

from __future__ import annotations

from cluster.config import ServiceConfig
from router.messages import EngineSettings, MissingExpertPolicy


def engine_settings(config: ServiceConfig) -> EngineSettings:
    """config must be resolved (cluster.service_model.resolve)."""
    assert config.dtype != "auto"
    assert config.max_model_len is not None
    assert config.router_threads is not None
    return EngineSettings(
        model=config.model,
        dtype=config.dtype,
        expert_dtype=config.expert_dtype,
        device=config.device,
        num_threads=config.router_threads,
        max_model_len=config.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_logprobs=config.max_logprobs,
        block_size=config.block_size,
        num_kv_blocks=config.num_kv_blocks,
        on_missing_expert=MissingExpertPolicy(config.on_missing_expert),
        expert_wait_s=config.expert_wait_s,
        lane_timeout_s=config.lane_timeout_s,
        lane_silence_s=config.lane_silence_s,
        log=config.log_settings,
        lane_transport=config.lane_transport,
        lane_spin_us=config.lane_spin_us,
        micro_batches=config.micro_batches,
    )
