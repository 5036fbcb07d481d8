"""The gated MLP that routed experts, shared experts and dense layers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from experts.linear import PackedLinear
from experts.native.kernels import ExpertKernels, PackedMatrix
from experts.native_linear import NativeLinear
from experts.torch_linear import TorchLinear


class Expert(Protocol):
    """What a shard needs of an expert."""

    @property
    def num_bytes(self) -> int: ...

    def __call__(self, x_RD: torch.Tensor) -> torch.Tensor:
        """[R, D] to the same shape, each row by itself."""


class NativeParts(NamedTuple):
    """matrices: gate, up and down."""

    kernels: ExpertKernels
    matrices: tuple[PackedMatrix, PackedMatrix, PackedMatrix]


class TorchParts(NamedTuple):
    gate: TorchLinear
    up: TorchLinear
    down: PackedLinear


class Mlp:
    """``down(silu(gate(x)) * up(x))`` (llama4.md §2, steps 7 and 8). Input and output are [R, D]."""

    def __init__(self, *, gate: PackedLinear, up: PackedLinear, down: PackedLinear) -> None:
        """All three are of one kind."""
        self.gate = gate
        self.up = up
        self.down = down
        self._num_bytes = gate.num_bytes + up.num_bytes + down.num_bytes
        self._parts: NativeParts | TorchParts
        if isinstance(gate, NativeLinear) and isinstance(up, NativeLinear) and isinstance(down, NativeLinear):
            self._parts = NativeParts(gate.kernels, (gate.matrix, up.matrix, down.matrix))
        else:
            assert isinstance(gate, TorchLinear)
            assert isinstance(up, TorchLinear)
            self._parts = TorchParts(gate, up, down)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    @property
    def native(self) -> NativeParts | None:
        """For the compiled kernels; None where there are none."""
        return self._parts if isinstance(self._parts, NativeParts) else None

    def __call__(self, x_RD: torch.Tensor, *, added_RD: torch.Tensor | None = None) -> torch.Tensor:
        """``down(silu(gate(x)) * up(x)) (+ added)``."""
        if isinstance(self._parts, TorchParts):
            gate, up, down = self._parts
            return down(up.times(x_RD, gate.silu(x_RD)), added_RO=added_RD)
        kernels, matrices = self._parts
        return kernels.experts(x_RD.contiguous(), (len(x_RD),), (matrices,), added_RD=added_RD)


def apply_experts(experts: Sequence[Expert], x_RD: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The first ``counts[0]`` rows through the first expert, and so on; the counts add up to R."""
    native = [expert.native for expert in experts if isinstance(expert, Mlp) and expert.native is not None]
    if native and len(native) == len(experts):
        return native[0].kernels.experts(x_RD.contiguous(), counts, [parts.matrices for parts in native])
    y_RD = torch.empty_like(x_RD)
    for expert, x, y in zip(experts, torch.split(x_RD, list(counts)), torch.split(y_RD, list(counts)), strict=True):
        y.copy_(expert(x))
    return y_RD
