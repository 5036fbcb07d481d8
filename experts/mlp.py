"""The gated MLP that routed experts, shared experts and dense layers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from experts.linear import PackedLinear


class Expert(Protocol):
    """What a shard needs of an expert."""

    @property
    def num_bytes(self) -> int: ...

    def __call__(self, x_RD: torch.Tensor) -> torch.Tensor:
        """[R, D] to the same shape, each row by itself."""


class Mlp:
    """``down(silu(gate(x)) * up(x))`` (llama4.md §2, steps 7 and 8). Input and output are [R, D]."""

    def __init__(self, *, gate: PackedLinear, up: PackedLinear, down: PackedLinear) -> None:
        self.gate = gate
        self.up = up
        self.down = down
        self.kernels = gate.kernels
        if gate.matrix is not None and up.matrix is not None and down.matrix is not None:
            self.matrices = (gate.matrix, up.matrix, down.matrix)

    @property
    def num_bytes(self) -> int:
        return self.gate.num_bytes + self.up.num_bytes + self.down.num_bytes

    def __call__(self, x_RD: torch.Tensor, *, added_RD: torch.Tensor | None = None) -> torch.Tensor:
        """``down(silu(gate(x)) * up(x)) (+ added)``."""
        if self.kernels is None:
            return self.down(self.up.times(x_RD, self.gate.silu(x_RD)), added_RO=added_RD)
        return self.kernels.experts(x_RD.contiguous(), (len(x_RD),), (self.matrices,), added_RD=added_RD)


def apply_experts(experts: Sequence[Expert], x_RD: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The first ``counts[0]`` rows through the first expert, and so on; the counts add up to R."""
    mlps = [expert for expert in experts if isinstance(expert, Mlp) and expert.kernels is not None]
    if mlps and len(mlps) == len(experts) and mlps[0].kernels is not None:
        return mlps[0].kernels.experts(x_RD.contiguous(), counts, [mlp.matrices for mlp in mlps])
    y_RD = torch.empty_like(x_RD)
    for expert, x, y in zip(experts, torch.split(x_RD, list(counts)), torch.split(y_RD, list(counts)), strict=True):
        y.copy_(expert(x))
    return y_RD
