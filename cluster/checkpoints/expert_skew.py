"""An uneven gate for random checkpoints: a chosen share of the tokens goes to a few hot experts.

Without a bias the gate of a random model cannot be skewed by the size of its rows alone (a single expert would
get at most half of the tokens). So the token says whether it is hot: each MoE layer owns one channel of the
residual stream, the embedding writes +1 or -1 there, no layer writes it again, and the gate rows of the hot
experts read it with a weight that outweighs everything else. Which of the hot (or of the other) experts a token
takes is left to the random rest of the gate.

A token is hot in about SHARE of the layers and a layer has about SHARE of the vocabulary hot, both by a
low-discrepancy sequence, so the share also holds for texts that use few different tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt

_TOKEN_STEP = (sqrt(5) - 1) / 2
_LAYER_STEP = sqrt(2) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSkew:
    """About ``share`` of the tokens go to experts 0 to ``num_hot_experts`` - 1 of every MoE layer."""

    share: float
    num_hot_experts: int

    def __post_init__(self) -> None:
        if not (isfinite(self.share) and 0 < self.share <= 1):
            raise ValueError(f"expert_skew: the share must be above 0 and at most 1, got {self.share}")
        if self.num_hot_experts < 1:
            raise ValueError(f"expert_skew: at least one expert must be hot, got {self.num_hot_experts}")

    @classmethod
    def parse(cls, text: str) -> ExpertSkew:
        """From ``SHARE:N``, for instance ``0.8:2``. Raises ValueError for anything else."""
        share, separator, num_hot_experts = text.partition(":")
        try:
            if separator:
                return cls(share=float(share), num_hot_experts=int(num_hot_experts))
        except ValueError as error:
            raise ValueError(f"expert_skew must be SHARE:N such as 0.8:2, got {text!r}: {error}") from error
        raise ValueError(f"expert_skew must be SHARE:N such as 0.8:2, got {text!r}")

    def is_hot(self, token_id: int, moe_layer_index: int) -> bool:
        """Whether this token goes to the hot experts of the MoE layer with this number (from 0)."""
        return (token_id * _TOKEN_STEP + moe_layer_index * _LAYER_STEP) % 1.0 < self.share
