"""As what weights of routed experts are kept in memory: in the model's dtype, or as whole numbers with scales. Free of
torch: whoever only plans shards needs it, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

QuantizedDtype = Literal["int8", "int4"]
ExpertDtypeChoice = Literal["auto", "int8", "int4"]

BITS: dict[QuantizedDtype, int] = {"int8": 8, "int4": 4}
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Inputs of an output that share a scale in int4.
GROUP_SIZE = 64
# What an axis must be a multiple of: kernels read whole panels and whole units.
AXIS_STEP = 16
# Inputs behind one row of scales in the kernels' layout, by the bits of a number.
SEGMENT_INPUTS = {8: 256, 4: GROUP_SIZE}
SCALE_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertDtype:
    """compute: torch's name of what rows and results are. stored: None is the same."""

    compute: str
    stored: QuantizedDtype | None = None

    @classmethod
    def chosen(cls, compute: str, choice: ExpertDtypeChoice) -> ExpertDtype:
        return cls(compute=compute, stored=None if choice == "auto" else choice)

    def weight_bytes(self, out_features: int, in_features: int) -> int:
        """Of a matrix."""
        if self.stored is None:
            return out_features * in_features * ITEMSIZES[self.compute]
        return out_features * row_bytes(in_features, BITS[self.stored])


def row_bytes(in_features: int, bits: int) -> int:
    """Of one output of a quantised matrix, its scales included."""
    return in_features * bits // 8 + -(-in_features // SEGMENT_INPUTS[bits]) * SCALE_BYTES


def check_axis(name: str, size: int) -> None:
    """Raises ValueError for a size that quantised weights cannot have."""
    if size % AXIS_STEP:
        raise ValueError(f"{name} must be a multiple of {AXIS_STEP} with expert_dtype int8 or int4, not {size}")
