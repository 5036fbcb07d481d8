"""A linear layer whose weight is laid out once, at load, for the kernel that reads it.

On a CPU the weight is packed by oneDNN. That is twice as fast at decode as the checkpoint's layout, and it is
also what makes a row's bits independent of the rows beside it: with a packed weight oneDNN takes the same path
for every row count but one. A single row goes to a split-K kernel once in_features exceeds about a thousand, so
a lone row is computed as two. Element-wise silu of ATen is not row-independent either (its vector body and its
scalar tail round differently), hence silu and the gating product run inside oneDNN as post-ops.

Shapes: R rows, I in_features, O out_features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class PackedLinear:
    """``y_RO = x_RI @ weight_OI.T`` without a bias. x has the weight's dtype and device."""

    def __init__(self, weight_OI: torch.Tensor) -> None:
        """Takes any strides; the given tensor is not kept on a CPU, so the caller may free it."""
        self.out_features, self.in_features = weight_OI.shape
        self.dtype = weight_OI.dtype
        self.device = weight_OI.device
        self._packed = self.device.type == "cpu"
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI) if self._packed else weight_OI

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight itself; the packed layout adds padding of less than one block per axis."""
        return self.out_features * self.in_features * self.dtype.itemsize

    def __call__(self, x_RI: torch.Tensor) -> torch.Tensor:
        return self._apply(x_RI, "none") if self._packed else F.linear(x_RI, self._weight)

    def silu(self, x_RI: torch.Tensor) -> torch.Tensor:
        """``silu(x @ W.T)``."""
        return self._apply(x_RI, "swish") if self._packed else F.silu(F.linear(x_RI, self._weight))

    def times(self, x_RI: torch.Tensor, factor_RO: torch.Tensor) -> torch.Tensor:
        """``(x @ W.T) * factor``."""
        if not self._packed:
            return F.linear(x_RI, self._weight) * factor_RO
        if x_RI.shape[0] == 0:
            return x_RI.new_empty(0, self.out_features)
        if x_RI.shape[0] == 1:
            return self.times(x_RI.expand(2, -1).contiguous(), factor_RO.expand(2, -1).contiguous())[:1]
        y_RO: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x_RI, factor_RO, self._weight, None, "mul")
        return y_RO

    def _apply(self, x_RI: torch.Tensor, post_op: str) -> torch.Tensor:
        if x_RI.shape[0] == 0:
            return x_RI.new_empty(0, self.out_features)
        if x_RI.shape[0] == 1:
            return self._apply(x_RI.expand(2, -1).contiguous(), post_op)[:1]
        y_RO: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_RI, self._weight, None, post_op, [], "")
        return y_RO
