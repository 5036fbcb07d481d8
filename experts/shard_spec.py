"""All that a shard's process is told when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field

from experts.expert_dtype import ExpertDtype, QuantizedDtype
from experts.expert_shape import ExpertShape
from experts.logs import LogSettings
from experts.placement import ShardId, Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSpec:
    """model: a folder or a hub id; its experts have the given shape, by its configuration. dtype: torch's name, for
    example "bfloat16"; quantized: as what the experts are kept, None as that. num_threads: of one matmul.
    lane_spin_us: how long the service looks for rows before it sleeps, None for what suits the host."""

    shard_id: ShardId
    model: str
    shape: ExpertShape
    slots: tuple[Slot, ...]
    dtype: str
    device: str
    num_threads: int
    secret: bytes
    weights_version: int
    log: LogSettings = field(default_factory=LogSettings)
    lane_spin_us: int | None = None
    quantized: QuantizedDtype | None = None

    @property
    def expert_dtype(self) -> ExpertDtype:
        return ExpertDtype(compute=self.dtype, stored=self.quantized)
