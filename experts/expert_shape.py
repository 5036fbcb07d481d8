"""The size of a model's routed experts. Free of torch: whoever only plans shards needs it, too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """What the experts of all MoE layers have in common."""

    hidden_size: int
    intermediate_size: int
    num_experts: int

    def slot_bytes(self, itemsize: int) -> int:
        """Of one expert's three matrices, in a dtype of this many bytes."""
        return 3 * self.hidden_size * self.intermediate_size * itemsize

    @property
    def flops_per_row(self) -> int:
        return 2 * 3 * self.hidden_size * self.intermediate_size
