"""Runs of rows of a tensor that is used again and again.

Cutting a tensor is a torch operation, and in a process that has just been woken up one of those costs as much as the
whole rest of a small message's way (tens of microseconds: its code is in no cache). A lane's small messages lie at
the same few places, so cuts are kept.

Shapes: R rows, D model.
"""

from __future__ import annotations

import torch

_MAX_KEPT = 256


class RowViews:
    """``views[start:stop]`` is rows_RD[start:stop]; belongs to one thread."""

    def __init__(self, rows_RD: torch.Tensor) -> None:
        self._rows_RD = rows_RD
        self._kept: dict[tuple[int, int], torch.Tensor] = {}

    def __getitem__(self, run: slice) -> torch.Tensor:
        key = (run.start, run.stop)
        kept = self._kept.get(key)
        if kept is None:
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            kept = self._kept[key] = self._rows_RD[run]
        return kept
