"""Root-mean-square norms (llama4.md §2). Statistics are float32; each ATen reduction here is row-independent."""

from __future__ import annotations

import torch

from router.native.kernels import layer_kernels


def rms_normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Weightless, over the last axis, in x's dtype."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """The cast comes before the multiply, which is in the model's dtype: in bfloat16 the order is visible."""
    kernels = layer_kernels() if x_TD.device.type == "cpu" else None
    if kernels is not None:
        return kernels.rms_norm(x_TD, weight_D, eps)
    return rms_normalize(x_TD, eps) * weight_D
