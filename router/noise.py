"""Sampling noise as a function: the same choice of the same request gets the same numbers on any machine."""

from __future__ import annotations

import hashlib
import struct


def uniform(*, seed: int, choice_index: int, position: int) -> float:
    """A number in [0, 1) for one output position; 53 random bits, so exact in float64.

    Counter-based: nothing is drawn in sequence, hence neither the batch, nor preemption, nor a resumption on
    another router can shift it.
    """
    digest = hashlib.blake2b(struct.pack("<3q", seed, choice_index, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
