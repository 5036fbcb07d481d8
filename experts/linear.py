"""A linear layer whose weight is laid out once, at load, for the kernel that reads it.

On a CPU that is one of two. The compiled kernels of experts/native sum up each result word by word, so a row's bits
do not depend on the rows beside it (native_linear.py). Where there are none, torch computes (torch_linear.py).

Shapes: R rows, I in_features, O out_features.
"""

from __future__ import annotations

import torch

from experts.expert_dtype import QuantizedDtype
from experts.native.kernels import expert_kernels
from experts.native_linear import NativeLinear
from experts.quantize import quantize
from experts.torch_linear import OneDnnLinear, PlainLinear, QuantizedLinear, TorchLinear

PackedLinear = NativeLinear | TorchLinear
"""``y_RO = x_RI @ weight_OI.T`` without a bias; x has the dtype and device that it was made for. A call may add to it,
``wide`` is in float32. num_bytes is of the weight itself, without a packed layout's padding."""


def pack_linear(weight_OI: torch.Tensor, quantized: QuantizedDtype | None = None) -> PackedLinear:
    """Takes any strides; the given tensor is not kept on a CPU, so the caller may free it.

    quantized: as what the weight is kept, None for its own dtype. Raises ValueError as ``quantize`` does.
    """
    if quantized is not None:
        weight = quantize(weight_OI, quantized)
        kernels = expert_kernels(quantized=True) if weight_OI.device.type == "cpu" else None
        return QuantizedLinear(weight) if kernels is None else NativeLinear(kernels, kernels.pack_quantized(weight))
    if weight_OI.device.type != "cpu":
        return PlainLinear(weight_OI)
    kernels = expert_kernels()
    return OneDnnLinear(weight_OI) if kernels is None else NativeLinear(kernels, kernels.pack(weight_OI))
