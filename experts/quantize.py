"""Weights as whole numbers with scales: int8 with one scale for each output, int4 with one for each 64 inputs of it.

    weight[o, i] is about numbers[o, i] * scale[o, i // 64]

Shapes: O out_features, I in_features, G groups of inputs that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experts.expert_dtype import BITS, GROUP_SIZE, QuantizedDtype, check_axis

_ROWS_AT_A_TIME = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """numbers_OI: int8, of int4 -8..7. scales_OG: float32. dtype: of what is multiplied with it."""

    numbers_OI: torch.Tensor
    scales_OG: torch.Tensor
    bits: int
    dtype: torch.dtype

    def packed(self) -> PackedWeight:
        if self.bits == 8:
            return PackedWeight(self.numbers_OI, self.scales_OG, 8, self.dtype)
        even_OJ, odd_OJ = (self.numbers_OI.view(torch.uint8)[:, first::2] for first in (0, 1))
        return PackedWeight(even_OJ & 15 | odd_OJ << 4, self.scales_OG, 4, self.dtype)

    def dequantized(self) -> torch.Tensor:
        """[O, I] in dtype."""
        num_in = self.numbers_OI.shape[1]
        group = num_in if self.scales_OG.shape[1] == 1 else GROUP_SIZE
        scales_OI = self.scales_OG.repeat_interleave(group, dim=1)[:, :num_in]
        return (self.numbers_OI * scales_OI).to(self.dtype)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A QuantizedWeight in as much memory as it needs: two numbers of int4 are a byte."""

    packed: torch.Tensor
    scales_OG: torch.Tensor
    bits: int
    dtype: torch.dtype

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def in_features(self) -> int:
        return self.packed.shape[1] * 8 // self.bits

    @property
    def num_bytes(self) -> int:
        return self.packed.numel() + self.scales_OG.numel() * 4

    def dequantized(self) -> torch.Tensor:
        """[O, I] in dtype."""
        numbers_OI = self.packed
        if self.bits == 4:
            # An arithmetic shift brings the sign along.
            halves = (self.packed << 4).view(torch.int8) >> 4, self.packed.view(torch.int8) >> 4
            numbers_OI = torch.stack(halves, dim=2).flatten(1)
        weight = QuantizedWeight(numbers_OI=numbers_OI, scales_OG=self.scales_OG, bits=self.bits, dtype=self.dtype)
        return weight.dequantized()


def quantize(weight_OI: torch.Tensor, kind: QuantizedDtype) -> QuantizedWeight:
    """Rounds to the nearest number; the largest weight of each scale is met exactly. Raises ValueError for an axis that
    is no multiple of AXIS_STEP, and for weights that are not finite."""
    num_out, num_in = weight_OI.shape
    check_axis("out_features", num_out)
    check_axis("in_features", num_in)
    num_groups = 1 if kind == "int8" else -(-num_in // GROUP_SIZE)
    numbers_OI = torch.empty(num_out, num_in, dtype=torch.int8, device=weight_OI.device)
    scales_OG = torch.empty(num_out, num_groups, device=weight_OI.device)
    for start in range(0, num_out, _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        numbers_OI[rows], scales_OG[rows] = _quantize_rows(weight_OI[rows].float(), kind, num_groups)
    return QuantizedWeight(numbers_OI=numbers_OI, scales_OG=scales_OG, bits=BITS[kind], dtype=weight_OI.dtype)


def _quantize_rows(weight_RI: torch.Tensor, kind: QuantizedDtype, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, num_in = weight_RI.shape
    group = num_in if num_groups == 1 else GROUP_SIZE
    grouped_RGS = torch.nn.functional.pad(weight_RI, (0, num_groups * group - num_in)).view(num_rows, num_groups, group)
    if kind == "int8":
        least, most = -127, 127
        scales_RG = grouped_RGS.abs().amax(dim=2) / 127
    else:
        # The largest weight becomes -8, whatever its sign: all 16 numbers are in use.
        least, most = -8, 7
        largest_RG1 = grouped_RGS.abs().argmax(dim=2, keepdim=True)
        scales_RG = grouped_RGS.gather(2, largest_RG1).squeeze(2) / -8
    if not scales_RG.isfinite().all():
        raise ValueError("a weight is not finite and cannot be quantised")
    divisors_RG1 = torch.where(scales_RG == 0, 1.0, scales_RG)[:, :, None]
    numbers_RGS = (grouped_RGS / divisors_RG1).round_().clamp_(least, most)
    return numbers_RGS.flatten(1)[:, :num_in].to(torch.int8), scales_RG
