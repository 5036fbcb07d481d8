"""A linear layer of the compiled kernels. Shapes: R rows, I in_features, O out_features."""

from __future__ import annotations

import torch

from experts.native.kernels import ExpertKernels, PackedMatrix


class NativeLinear:
    """See ``PackedLinear``."""

    def __init__(self, kernels: ExpertKernels, matrix: PackedMatrix) -> None:
        self.kernels = kernels
        self.matrix = matrix

    @property
    def out_features(self) -> int:
        return self.matrix.out_features

    @property
    def in_features(self) -> int:
        return self.matrix.in_features

    @property
    def num_bytes(self) -> int:
        return self.matrix.num_bytes

    def __call__(self, x_RI: torch.Tensor, *, added_RO: torch.Tensor | None = None) -> torch.Tensor:
        return self.kernels.matmul(x_RI.contiguous(), self.matrix, added_RO=added_RO)

    def wide(self, x_RI: torch.Tensor) -> torch.Tensor:
        return self.kernels.matmul(x_RI.contiguous(), self.matrix, wide=True)
