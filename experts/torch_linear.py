"""Linear layers where there are no compiled kernels.

oneDNN packs a weight, and takes the same path for every row count but one: a single row goes to a split-K kernel once
in_features exceeds about a thousand, so a lone row is computed as two. Element-wise silu of ATen is not
row-independent either (its vector body and its scalar tail round differently), hence silu and the gating product run
inside oneDNN as post-ops.

Shapes: R rows, I in_features, O out_features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F

from experts.quantize import QuantizedWeight


class TorchLinear(ABC):
    """See ``PackedLinear``."""

    @property
    @abstractmethod
    def out_features(self) -> int: ...

    @property
    @abstractmethod
    def in_features(self) -> int: ...

    @property
    @abstractmethod
    def num_bytes(self) -> int: ...

    @abstractmethod
    def product(self, x_RI: torch.Tensor) -> torch.Tensor:
        """``x @ W.T``."""

    @abstractmethod
    def silu(self, x_RI: torch.Tensor) -> torch.Tensor:
        """``silu(x @ W.T)``."""

    @abstractmethod
    def times(self, x_RI: torch.Tensor, factor_RO: torch.Tensor) -> torch.Tensor:
        """``(x @ W.T) * factor``."""

    def __call__(self, x_RI: torch.Tensor, *, added_RO: torch.Tensor | None = None) -> torch.Tensor:
        y_RO = self.product(x_RI)
        return y_RO if added_RO is None else added_RO + y_RO

    def wide(self, x_RI: torch.Tensor) -> torch.Tensor:
        return self.product(x_RI).float()


class PlainLinear(TorchLinear):
    """As torch has it, on any device."""

    def __init__(self, weight_OI: torch.Tensor) -> None:
        self._weight_OI = weight_OI

    @property
    def out_features(self) -> int:
        return self._weight_OI.shape[0]

    @property
    def in_features(self) -> int:
        return self._weight_OI.shape[1]

    @property
    def num_bytes(self) -> int:
        return self._weight_OI.numel() * self._weight_OI.dtype.itemsize

    def product(self, x_RI: torch.Tensor) -> torch.Tensor:
        return F.linear(x_RI, self._weight_OI)

    def silu(self, x_RI: torch.Tensor) -> torch.Tensor:
        return F.silu(F.linear(x_RI, self._weight_OI))

    def times(self, x_RI: torch.Tensor, factor_RO: torch.Tensor) -> torch.Tensor:
        return F.linear(x_RI, self._weight_OI) * factor_RO


class OneDnnLinear(TorchLinear):
    """On a CPU; a row's bits do not depend on the rows beside it."""

    def __init__(self, weight_OI: torch.Tensor) -> None:
        self._shape = weight_OI.shape
        self._itemsize = weight_OI.dtype.itemsize
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI)

    @property
    def out_features(self) -> int:
        return self._shape[0]

    @property
    def in_features(self) -> int:
        return self._shape[1]

    @property
    def num_bytes(self) -> int:
        return self._shape.numel() * self._itemsize

    def product(self, x_RI: torch.Tensor) -> torch.Tensor:
        return self._pointwise(x_RI, "none")

    def silu(self, x_RI: torch.Tensor) -> torch.Tensor:
        return self._pointwise(x_RI, "swish")

    def times(self, x_RI: torch.Tensor, factor_RO: torch.Tensor) -> torch.Tensor:
        if x_RI.shape[0] == 0:
            return x_RI.new_empty(0, self.out_features)
        if x_RI.shape[0] == 1:
            return self.times(x_RI.expand(2, -1).contiguous(), factor_RO.expand(2, -1).contiguous())[:1]
        y_RO: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x_RI, factor_RO, self._packed, None, "mul")
        return y_RO

    def _pointwise(self, x_RI: torch.Tensor, post_op: str) -> torch.Tensor:
        if x_RI.shape[0] == 0:
            return x_RI.new_empty(0, self.out_features)
        if x_RI.shape[0] == 1:
            return self._pointwise(x_RI.expand(2, -1).contiguous(), post_op)[:1]
        y_RO: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_RI, self._packed, None, post_op, [], "")
        return y_RO


class QuantizedLinear(TorchLinear):
    """Keeps the numbers, and makes the weight of them for each product: as small as with compiled kernels, and slow.

    In bfloat16 the weight is rounded once more than there, where scales are applied to sums.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        self._weight = weight.packed()
        self._device = weight.numbers_OI.device

    @property
    def out_features(self) -> int:
        return self._weight.out_features

    @property
    def in_features(self) -> int:
        return self._weight.in_features

    @property
    def num_bytes(self) -> int:
        return self._weight.num_bytes

    def product(self, x_RI: torch.Tensor) -> torch.Tensor:
        return self._unpacked().product(x_RI)

    def silu(self, x_RI: torch.Tensor) -> torch.Tensor:
        return self._unpacked().silu(x_RI)

    def times(self, x_RI: torch.Tensor, factor_RO: torch.Tensor) -> torch.Tensor:
        return self._unpacked().times(x_RI, factor_RO)

    def _unpacked(self) -> TorchLinear:
        weight_OI = self._weight.dequantized()
        return OneDnnLinear(weight_OI) if self._device.type == "cpu" else PlainLinear(weight_OI)
