"""Handing freed memory back to the system while weights are loaded."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Gives the C allocator's free pages back; call it after dropping large buffers.

    glibc keeps freed buffers of up to 32 MiB in its heap, and the packed weights that are allocated between them
    pin it: a process that loads thousands of matrices would end at up to twice its weights. Without glibc's
    malloc_trim this does nothing; other allocators return large buffers by themselves.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
