"""What the checkpoint says about the service, and the configuration with every open choice made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.config import ServiceConfig
from experts.expert_dtype import check_axis
from router.config import ModelConfig

MAX_DEFAULT_MODEL_LEN = 8192
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16", None: "bfloat16"}


def read_model_config(folder: Path) -> ModelConfig:
    """Raises FileNotFoundError or ValueError naming the file, or the field and its value."""
    generation_path = folder / "generation_config.json"
    generation = _read_object(generation_path) if generation_path.exists() else None
    return ModelConfig.from_checkpoint_config(_read_object(folder / "config.json"), generation)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return raw


def resolve(config: ServiceConfig, model: ModelConfig, num_cores: int) -> ServiceConfig:
    """The same configuration without None where the checkpoint or the machine decides (but for the KV cache's
    size, which each router decides from its own memory).

    Raises ValueError where configuration and model contradict each other.
    """
    if config.copies > 1 and model.num_moe_layers == 0:
        raise ValueError(f"copies must be 1 for a model without MoE layers, not {config.copies}")
    max_model_len = config.max_model_len or min(model.max_position_embeddings, MAX_DEFAULT_MODEL_LEN)
    if max_model_len > model.max_position_embeddings:
        raise ValueError(
            f"max_model_len must be at most the model's max_position_embeddings "
            f"({model.max_position_embeddings}), not {max_model_len}"
        )
    if config.expert_dtype != "auto":
        check_axis("hidden_size", model.hidden_size)
        check_axis("intermediate_size of the experts", model.expert_shape.intermediate_size)
    threads = max(1, num_cores // (config.most_routers + config.most_shards))
    return config.model_copy(
        update={
            "dtype": _dtype(config, model),
            "max_model_len": max_model_len,
            "block_size": model.block_size_for(config.block_size),
            "max_num_seqs": min(config.max_num_seqs, config.max_num_batched_tokens),
            "router_threads": config.router_threads or threads,
            "shard_threads": config.shard_threads or threads,
        }
    )


def _dtype(config: ServiceConfig, model: ModelConfig) -> str:
    if config.dtype != "auto":
        return config.dtype
    if model.torch_dtype not in DTYPES:
        raise ValueError(f"torch_dtype {model.torch_dtype!r} of the checkpoint is not supported: set dtype")
    return DTYPES[model.torch_dtype]
