"""Quantised weights as the kernels read them: panels, segments and units of quantized.inc.h.

Shapes: P panels of 16 outputs, G segments, U units of 64 bytes, L 16 lanes of a panel, E elements of a word (1: float,
2: bfloat16), J words of a unit.
"""

from __future__ import annotations

import torch

from experts.expert_dtype import SCALE_BYTES, SEGMENT_INPUTS, row_bytes
from experts.quantize import QuantizedWeight
from experts.resident import resident_tensor

LANES = 16
SCALES_BYTES = LANES * SCALE_BYTES


def lay_out(weight: QuantizedWeight, word_elements: int) -> torch.Tensor:
    """int32 words, front to back as they are read."""
    num_out, num_in = weight.numbers_OI.shape
    num_panels = num_out // LANES
    laid_out = resident_tensor((num_out * row_bytes(num_in, weight.bits) // 4,), torch.int32)
    panels_PB = laid_out.view(torch.uint8).view(num_panels, -1)
    units = _units_of_8 if weight.bits == 8 else _units_of_4
    scales_PLG = weight.scales_OG.view(num_panels, LANES, -1)
    width = SEGMENT_INPUTS[weight.bits]
    at = 0
    for start in range(0, num_in, width):
        group = min(start // width, scales_PLG.shape[2] - 1)
        panels_PB[:, at : at + SCALES_BYTES] = scales_PLG[:, :, group].contiguous().view(torch.uint8)
        at += SCALES_BYTES
        numbers_PB = units(weight.numbers_OI[:, start : start + width], word_elements)
        panels_PB[:, at : at + numbers_PB.shape[1]] = numbers_PB
        at += numbers_PB.shape[1]
    return laid_out


def _words(numbers_OI: torch.Tensor, word_elements: int, unit_words: int) -> torch.Tensor:
    """[P, U, J, L * E]: elements in the order of an unquantised panel."""
    num_out, num_in = numbers_OI.shape
    shape = num_out // LANES, LANES, num_in // word_elements // unit_words, unit_words, word_elements
    return numbers_OI.reshape(shape).permute(0, 2, 3, 1, 4).flatten(3)


def _units_of_8(numbers_OI: torch.Tensor, word_elements: int) -> torch.Tensor:
    """uint8 [P, bytes]."""
    words = _words(numbers_OI, word_elements, 4 // word_elements)
    if word_elements == 2:
        # Sign and magnitude; 8 elements of the first word, 8 of the second, and so on.
        words = words.to(torch.int16).abs().to(torch.uint8) | (words < 0).to(torch.uint8) * 128
        words = words.view(*words.shape[:3], 4, 8).transpose(2, 3)
    return words.reshape(len(words), -1).view(torch.uint8)


def _units_of_4(numbers_OI: torch.Tensor, word_elements: int) -> torch.Tensor:
    """uint8 [P, bytes]."""
    words_PUJN = _words(numbers_OI, word_elements, 8 // word_elements).to(torch.int32) + 8
    packed_PUN = words_PUJN[:, :, 0].clone()
    for word in range(1, 8 // word_elements):
        packed_PUN |= words_PUJN[:, :, word] << (4 * word)
    packed_PUN = packed_PUN if word_elements == 1 else packed_PUN.to(torch.int16)
    return packed_PUN.reshape(len(packed_PUN), -1).view(torch.uint8)
