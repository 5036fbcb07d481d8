"""A shard from a checkpoint, and further slots for it: reads what it is told to hold, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from experts.checkpoint import Checkpoint
from experts.hub import resolve_model
from experts.memory import free_bytes
from experts.mlp import Mlp
from experts.placement import Slot
from experts.progress import Progress, log_progress
from experts.shard import Shard
from experts.shard_spec import ShardSpec
from experts.weights import load_slots

_LOG = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHARE_OF_FREE_MEMORY = 0.5


def load_shard(spec: ShardSpec) -> Shard:
    """Raises CheckpointError for a checkpoint that does not fit, ValueError for an unknown dtype."""
    progress = log_progress(_LOG, f"{len(spec.slots)} slots of {spec.shard_id}")
    return Shard(
        shard_id=spec.shard_id,
        slots=load_more(spec, spec.slots, progress),
        hidden_size=spec.shape.hidden_size,
        dtype=_dtype(spec),
        device=spec.device,
        weights_version=spec.weights_version,
    )


def load_more(spec: ShardSpec, slots: Sequence[Slot], progress: Progress, model: str | None = None) -> dict[Slot, Mlp]:
    """Slots for the shard of this spec, in this thread, of its own model or of another one of the same shape. Raises as
    ``load_shard`` does."""
    dtype = _dtype(spec)
    torch.set_num_threads(spec.num_threads)
    checkpoint = Checkpoint.open(resolve_model(model or spec.model))
    return load_slots(
        checkpoint, slots, spec.shape, dtype=dtype, device=spec.device, quantized=spec.quantized, progress=progress
    )


def num_free_slots(spec: ShardSpec) -> int:
    """How many further slots would fit, leaving half of the free memory to whoever else needs it."""
    return int(num_free_bytes(spec) * _SHARE_OF_FREE_MEMORY) // spec.shape.slot_bytes(spec.expert_dtype)


def num_free_bytes(spec: ShardSpec) -> int:
    """Of the memory that the shard's weights lie in, all that is free."""
    return free_bytes(torch.device(spec.device))


def _dtype(spec: ShardSpec) -> torch.dtype:
    if spec.dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {sorted(_DTYPES)}, got {spec.dtype!r}")
    return _DTYPES[spec.dtype]
