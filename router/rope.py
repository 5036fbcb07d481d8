"""Rotary position embedding in float32: interleaved pairs (GPT-J), llama3 frequency scaling.

Rope layers never attend across chunks, so a position relative to its chunk's start rotates exactly as the absolute
one would (llama4.md §2.2). Angles therefore stay below the chunk size and are computed for the tokens of a step;
no table is sized by max_position_embeddings. Angles and their sines are float64, rounded once.

Shapes: T tokens, H heads, D head_dim, J = D / 2 pairs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from router.config import Llama3Scaling, RopeConfig


class Rotation(NamedTuple):
    cos_TJ: torch.Tensor
    sin_TJ: torch.Tensor


def inverse_frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> torch.Tensor:
    """float32 [J]: radians per position of each pair."""
    exponent_J = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequency_J = 1.0 / (rope.theta**exponent_J)
    if rope.scaling is not None:
        frequency_J = _scale(frequency_J, rope.scaling)
    return frequency_J.to(device)


def rotation(positions_T: torch.Tensor, inverse_frequencies_J: torch.Tensor) -> Rotation:
    """float32 cosines and sines of every token's pairs. ``positions_T`` are integers, relative to the chunk."""
    angle_TJ = positions_T[:, None].double() * inverse_frequencies_J.double()
    return Rotation(angle_TJ.cos().float(), angle_TJ.sin().float())


def rotate(x_THD: torch.Tensor, by: Rotation) -> torch.Tensor:
    """Rotates each pair (2j, 2j+1) of every head in float32; the result has x's dtype."""
    even_THJ, odd_THJ = x_THD.float().reshape(*x_THD.shape[:-1], -1, 2).unbind(-1)
    cos_T1J, sin_T1J = by.cos_TJ[:, None], by.sin_TJ[:, None]
    rotated = (even_THJ * cos_T1J - odd_THJ * sin_T1J, even_THJ * sin_T1J + odd_THJ * cos_T1J)
    return torch.stack(rotated, dim=-1).flatten(-2).to(x_THD.dtype)


def _scale(frequency_J: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between blended linearly."""
    turns_J = scaling.original_max_position_embeddings * frequency_J / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # Scout has low == high: nothing lies between, and the blend would divide by zero.
    kept_J = (turns_J - low) / (high - low) if high > low else (turns_J >= low).float()
    kept_J = kept_J.clamp(0.0, 1.0)
    return (1.0 - kept_J) * frequency_J / scaling.factor + kept_J * frequency_J
