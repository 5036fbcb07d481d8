"""A linear layer whose weight is laid out once, at load, for the kernel that reads it.

On a CPU that is one of two. The compiled kernels of experts/native sum up each result word by word, so a row's bits
do not depend on the rows beside it. Where there are none, oneDNN packs the weight: with a packed weight it takes the
same path for every row count but one. A single row goes to a split-K kernel once in_features exceeds about a
thousand, so a lone row is computed as two. Element-wise silu of ATen is not row-independent either (its vector body
and its scalar tail round differently), hence silu and the gating product run inside oneDNN as post-ops.

Shapes: R rows, I in_features, O out_features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from experts.native.kernels import ExpertKernels, PackedMatrix, expert_kernels


class PackedLinear:
    """``y_RO = x_RI @ weight_OI.T`` without a bias. x has the weight's dtype and device."""

    def __init__(self, weight_OI: torch.Tensor) -> None:
        """Takes any strides; the given tensor is not kept on a CPU, so the caller may free it."""
        self.out_features, self.in_features = weight_OI.shape
        self.dtype = weight_OI.dtype
        self.device = weight_OI.device
        self.kernels: ExpertKernels | None = None
        self.matrix: PackedMatrix | None = None
        self._weight: torch.Tensor | None = None
        self._is_onednn = False
        if self.device.type != "cpu":
            self._weight = weight_OI
        elif (kernels := expert_kernels()) is not None:
            self.kernels, self.matrix = kernels, kernels.pack(weight_OI)
        else:
            self._weight, self._is_onednn = torch.ops.mkldnn._reorder_linear_weight(weight_OI), True

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight itself; the packed layout adds padding of less than one block per axis."""
        return self.out_features * self.in_features * self.dtype.itemsize

    def __call__(self, x_RI: torch.Tensor, *, added_RO: torch.Tensor | None = None) -> torch.Tensor:
        """``x @ W.T (+ added)``."""
        if self.kernels is not None and self.matrix is not None:
            return self.kernels.matmul(x_RI.contiguous(), self.matrix, added_RO=added_RO)
        y_RO = self._product(x_RI)
        return y_RO if added_RO is None else added_RO + y_RO

    def wide(self, x_RI: torch.Tensor) -> torch.Tensor:
        """``x @ W.T`` in float32."""
        if self.kernels is not None and self.matrix is not None:
            return self.kernels.matmul(x_RI.contiguous(), self.matrix, wide=True)
        return self._product(x_RI).float()

    def silu(self, x_RI: torch.Tensor) -> torch.Tensor:
        """``silu(x @ W.T)``. Not with compiled kernels, which compute an MLP as a whole."""
        assert self._weight is not None
        return self._onednn(x_RI, "swish") if self._is_onednn else F.silu(F.linear(x_RI, self._weight))

    def times(self, x_RI: torch.Tensor, factor_RO: torch.Tensor) -> torch.Tensor:
        """``(x @ W.T) * factor``. Not with compiled kernels."""
        assert self._weight is not None
        if not self._is_onednn:
            return F.linear(x_RI, self._weight) * factor_RO
        if x_RI.shape[0] == 0:
            return x_RI.new_empty(0, self.out_features)
        if x_RI.shape[0] == 1:
            return self.times(x_RI.expand(2, -1).contiguous(), factor_RO.expand(2, -1).contiguous())[:1]
        y_RO: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x_RI, factor_RO, self._weight, None, "mul")
        return y_RO

    def _product(self, x_RI: torch.Tensor) -> torch.Tensor:
        assert self._weight is not None
        return self._onednn(x_RI, "none") if self._is_onednn else F.linear(x_RI, self._weight)

    def _onednn(self, x_RI: torch.Tensor, post_op: str) -> torch.Tensor:
        if x_RI.shape[0] == 0:
            return x_RI.new_empty(0, self.out_features)
        if x_RI.shape[0] == 1:
            return self._onednn(x_RI.expand(2, -1).contiguous(), post_op)[:1]
        y_RO: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_RI, self._weight, None, post_op, [], "")
        return y_RO
