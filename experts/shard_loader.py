"""A shard from a checkpoint: reads the slots it is told to hold, and nothing else."""

from __future__ import annotations

import logging

import torch

from experts.checkpoint import Checkpoint
from experts.hub import resolve_model
from experts.progress import log_progress
from experts.shard import Shard
from experts.shard_spec import ShardSpec
from experts.weights import load_slots

_LOG = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_shard(spec: ShardSpec) -> Shard:
    """Raises CheckpointError for a checkpoint that does not fit, ValueError for an unknown dtype."""
    if spec.dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {sorted(_DTYPES)}, got {spec.dtype!r}")
    dtype = _DTYPES[spec.dtype]
    torch.set_num_threads(spec.num_threads)
    checkpoint = Checkpoint.open(resolve_model(spec.model))

    slots = load_slots(
        checkpoint,
        spec.slots,
        spec.shape,
        dtype=dtype,
        device=spec.device,
        progress=log_progress(_LOG, f"{len(spec.slots)} slots of {spec.shard_id}"),
    )
    return Shard(
        shard_id=spec.shard_id,
        slots=slots,
        hidden_size=spec.shape.hidden_size,
        dtype=dtype,
        device=spec.device,
        weights_version=spec.weights_version,
    )
