"""Memory for numbers that stay and are read over and over, such as weights and the KV cache.

They lie in pages of their own: huge ones where the system has them, for a decode step reads every weight once, and
finding a page costs more than reading it (in a virtual machine half of the bandwidth). Pages that are never written to
take no memory, and all go back to the system with the last reference.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from math import prod

import torch

HUGE_PAGE_BYTES = 2 * 2**20


def resident_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous CPU tensor of zeros."""
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes < HUGE_PAGE_BYTES:
        return torch.zeros(shape, dtype=dtype)
    # A huge page begins at a multiple of its size; what is reserved and not used before that costs nothing. Private:
    # memory that could be shared has another setting for huge pages, which is off almost everywhere.
    pages = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    reserved = torch.frombuffer(pages, dtype=torch.uint8)
    first = -reserved.data_ptr() % HUGE_PAGE_BYTES
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A wish: a kernel without huge pages has no such advice. Not for the end, which would take a whole one.
        with suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE, first, num_bytes - num_bytes % HUGE_PAGE_BYTES)
    return reserved[first : first + num_bytes].view(dtype).view(shape)
