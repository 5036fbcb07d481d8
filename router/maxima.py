"""The largest number of each row of logits: what greedy sampling takes, and what tells a row that is not finite.

Legend: L rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from router.native.kernels import layer_kernels


class Maxima(NamedTuple):
    """NaN where a row has one. ids_L: the first token with that value; anything where it is NaN."""

    values_L: torch.Tensor
    ids_L: torch.Tensor

    def of(self, rows: list[int]) -> Maxima:
        return Maxima(self.values_L[rows], self.ids_L[rows])


def row_maxima(logits_LV: torch.Tensor) -> Maxima:
    """logits_LV is float32; L may be 0."""
    kernels = layer_kernels() if logits_LV.device.type == "cpu" else None
    if kernels is not None:
        return Maxima(*kernels.largest_of_rows(logits_LV.contiguous()))
    return Maxima(*logits_LV.max(dim=-1))
