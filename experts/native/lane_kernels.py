"""The compiled kernels of lanes: sorting and summing up rows, and waiting."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from experts.native.build import BuildError, load_library
from experts.native.kernels import DTYPES, FOLDER, kernels_are_wanted

# As in rows.c and wait.c.
MAX_TOP_K = 64
MAX_EVENTS = 64

logger = logging.getLogger(__name__)

Indices = npt.NDArray[np.int64]
_POINTER, _COUNT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class SortedCopies(NamedTuple):
    """As in RowPlan; spans: (rank, first row, row behind the last) of each rank that has rows, flat."""

    copy_of_row_R: Indices
    row_of_copy_TK: Indices
    spans: list[int]


class LaneKernels:
    """CPU tensors only."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._sort, self._combine = {}, {}
        for dtype, (name, _elements) in DTYPES.items():
            sort = getattr(library, f"sort_rows_{name}")
            sort.argtypes = [
                _POINTER, _COUNT, _POINTER, _POINTER, _COUNT, _COUNT, _POINTER, _COUNT, _COUNT,
                _POINTER, _POINTER, _POINTER, _POINTER, _POINTER,
            ]  # fmt: skip
            sort.restype = _COUNT
            combine = getattr(library, f"combine_rows_{name}")
            combine.argtypes = [_POINTER, _COUNT, _POINTER, _COUNT, _COUNT, _POINTER]
            combine.restype = None
            self._sort[dtype], self._combine[dtype] = sort, combine
        self.wait_for_any = library.wait_for_any
        self.wait_for_any.argtypes = [_POINTER, _COUNT, _INT, _COUNT, _COUNT, _POINTER]
        self.wait_for_any.restype = _INT

    def sorts(self, x_TD: torch.Tensor, topk_ids_TK: torch.Tensor, topk_scores_TK: torch.Tensor) -> bool:
        """Whether ``sort_rows`` takes these."""
        return (
            x_TD.dtype in DTYPES
            and x_TD.device.type == "cpu"
            and topk_scores_TK.dtype is torch.float32
            and topk_ids_TK.dtype is torch.int64
            and topk_ids_TK.shape[1] <= MAX_TOP_K
        )

    def sort_rows(
        self,
        x_TD: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        topk_scores_TK: torch.Tensor,
        rank_E: Indices,
        num_ranks: int,
        rows_RB: npt.NDArray[np.uint8],
    ) -> SortedCopies:
        """Fills rows_RB with the scaled copies, by rank. rank_E: contiguous, each below num_ranks.

        Raises IndexError for an expert beyond rank_E.
        """
        x_TD, ids_TK, scores_TK = x_TD.contiguous(), topk_ids_TK.contiguous(), topk_scores_TK.contiguous()
        num_tokens, top_k = ids_TK.shape
        num_copies = num_tokens * top_k
        # starts, row_of_copy, copy_of_row, spans
        work = np.empty(num_ranks + 1 + 2 * num_copies + 3 * num_ranks, dtype=np.int64)
        at = work.ctypes.data
        copies_at = at + 8 * (num_ranks + 1)
        spans_at = copies_at + 16 * num_copies
        num_spans = self._sort[x_TD.dtype](
            x_TD.data_ptr(), x_TD.shape[1], ids_TK.data_ptr(), scores_TK.data_ptr(), num_tokens, top_k,
            rank_E.ctypes.data, len(rank_E), num_ranks, at, copies_at, copies_at + 8 * num_copies, spans_at,
            rows_RB.ctypes.data,
        )  # fmt: skip
        if num_spans < 0:
            raise IndexError("an expert that the order does not have")
        first, spans_from = num_ranks + 1, num_ranks + 1 + 2 * num_copies
        return SortedCopies(
            work[first + num_copies : spans_from],
            work[first : first + num_copies].reshape(num_tokens, top_k),
            work[spans_from : spans_from + 3 * num_spans].tolist(),
        )

    def combine_rows(
        self, rows_RB: npt.NDArray[np.uint8], row_of_copy_TK: Indices, like_TD: torch.Tensor
    ) -> torch.Tensor:
        """y_TD: each token's rows of like_TD's dtype, summed in float32 in the order of row_of_copy_TK."""
        # numpy's, and as large as rows come: quicker than asking torch for room.
        y_TB = np.empty((row_of_copy_TK.shape[0], rows_RB.shape[1]), dtype=np.uint8)
        num_tokens, top_k = row_of_copy_TK.shape
        assert row_of_copy_TK.flags.c_contiguous
        self._combine[like_TD.dtype](
            rows_RB.ctypes.data, like_TD.shape[1], row_of_copy_TK.ctypes.data, num_tokens, top_k, y_TB.ctypes.data
        )
        return torch.from_numpy(y_TB).view(like_TD.dtype)


class _End(ctypes.Structure):
    _fields_ = [("published", _POINTER), ("taken", _POINTER), ("asleep", _POINTER)]


class WaitedEnds:
    """The ends whose news lie in memory, as the kernel wants them, and room for what it finds."""

    def __init__(self, kernels: LaneKernels, lines: Sequence[tuple[int, int, int]]) -> None:
        """lines: of each end the addresses in _End. They must stay valid as long as this is waited with."""
        self._kernels = kernels
        self._num_ends = len(lines)
        self._ends = (_End * max(1, len(lines)))(*[_End(*each) for each in lines])
        self._found = (_COUNT * (3 + 2 * MAX_EVENTS + len(lines)))()
        self._ends_at, self._found_at = ctypes.addressof(self._ends), ctypes.addressof(self._found)

    def wait(self, epoll: int, *, spin_s: float, timeout_s: float) -> tuple[list[int], list[tuple[int, int]], float]:
        """Numbers of ends that have news; (descriptor, events) of sockets; for how long it took, 0.0 if at once.

        Raises OSError.
        """
        found = self._found
        error = self._kernels.wait_for_any(
            self._ends_at, self._num_ends, epoll, int(spin_s * 1e9), int(timeout_s * 1e9), self._found_at
        )
        if error:
            raise OSError(error, os.strerror(error))
        num_news, num_events = found[0], found[1]
        first = 3 + 2 * MAX_EVENTS
        news = found[first : first + num_news] if num_news else []
        events = [(found[3 + 2 * i], found[4 + 2 * i]) for i in range(num_events)] if num_events else []
        return news, events, found[2] * 1e-9


@cache
def lane_kernels() -> LaneKernels | None:
    """None where there are none to be had; the log says why. Compiles them when they are asked for first."""
    if not kernels_are_wanted():
        return None
    try:
        return LaneKernels(load_library("lanes", [FOLDER / "rows.c", FOLDER / "wait.c"]))
    except BuildError as error:
        logger.warning("no compiled kernels for lanes, rows wait longer on their way: %s", error)
        return None
