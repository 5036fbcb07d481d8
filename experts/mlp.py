"""The gated MLP that routed experts, shared experts and dense layers have in common."""

from __future__ import annotations

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

    @property
    def num_bytes(self) -> int:
        return self.gate.num_bytes + self.up.num_bytes + self.down.num_bytes

    def __call__(self, x_RD: torch.Tensor) -> torch.Tensor:
        return self.down(self.up.times(x_RD, self.gate.silu(x_RD)))
