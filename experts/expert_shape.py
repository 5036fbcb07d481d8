"""The size of a model's routed experts. Free of torch: whoever only plans shards needs it, too."""

from __future__ import annotations

from dataclasses import dataclass

from experts.expert_dtype import ExpertDtype


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """What the experts of all MoE layers have in common."""

    hidden_size: int
    intermediate_size: int
    num_experts: int

    def slot_bytes(self, dtype: ExpertDtype) -> int:
        """Of one expert's three matrices."""
        up, down = (self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)
        return 2 * dtype.weight_bytes(*up) + dtype.weight_bytes(*down)

    @property
    def flops_per_row(self) -> int:
        return 2 * 3 * self.hidden_size * self.intermediate_size
