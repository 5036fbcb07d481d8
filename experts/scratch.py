"""Memory for values that are only passing through, such as weights on their way into their kernel's layout.

The C library keeps freed blocks of up to 32 MiB for itself, and weights that stay are then laid between the
holes: a process that loaded experts through ordinary tensors ended up half as large again as its weights. These
tensors lie in pages of their own, which go back to the system with the last reference.
"""

from __future__ import annotations

from math import prod
from mmap import mmap

import torch

# Below this the C library's own blocks do no harm, and a page mapping costs more than it saves.
MIN_MAPPED_BYTES = 64 * 2**10


def scratch_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised, contiguous CPU tensor."""
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes < MIN_MAPPED_BYTES:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap(-1, num_bytes), dtype=dtype).view(shape)
