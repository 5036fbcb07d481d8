"""The compiled kernels of a router's layers, as functions of tensors."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

import experts.native
from experts.native.build import BuildError, load_library
from experts.native.kernels import DTYPES, kernels_are_wanted
from router.kv_cache import LayerKv
from router.rope import Rotation

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "attention.c", FOLDER / "layer.c")
HEADERS = Path(experts.native.__path__[0])

MAX_TILE_ROWS = 64
"""Query rows of a tile and KV head: MAX_TILE_ROWS of attention.c."""
MAX_HEAD_DIM = 1024

IntArray = npt.NDArray[np.int64]

logger = logging.getLogger(__name__)

_POINTER, _COUNT, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_CACHE = (_POINTER, _POINTER, _COUNT, _COUNT, _COUNT)


class PositionChanges(NamedTuple):
    """What a layer does to queries and keys: rotates them, and normalises if norm_eps is not None; or multiplies
    queries by a temperature [T]; or nothing."""

    rotation: Rotation | None = None
    norm_eps: float | None = None
    temperature_T: torch.Tensor | None = None


class LayerKernels:
    """CPU tensors only, of one dtype; shapes are not checked here."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._norm, self._position, self._attend = {}, {}, {}
        for dtype, (name, _elements) in DTYPES.items():
            self._norm[dtype] = _function(
                library, f"rms_norm_{name}", _POINTER, _COUNT, _COUNT, _POINTER, _FLOAT, _POINTER, _INT
            )
            self._position[dtype] = _function(
                library, f"position_{name}", _POINTER, _COUNT, _COUNT, *_CACHE, _POINTER, _POINTER, _POINTER, _FLOAT,
                _POINTER, _POINTER, _INT,
            )  # fmt: skip
            self._attend[dtype] = _function(
                library, f"attend_{name}", _POINTER, _COUNT, *_CACHE, _POINTER, _COUNT, _POINTER, _FLOAT, _POINTER,
                _POINTER, _INT,
            )  # fmt: skip
        self._largest = _function(library, "largest_of_rows", _POINTER, _COUNT, _COUNT, _POINTER, _POINTER, _INT)

    def rms_norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """As router.norm.rms_norm has it."""
        num_rows, width = x_TD.shape
        assert x_TD.is_contiguous()
        assert (weight_D.dtype, len(weight_D)) == (x_TD.dtype, width)
        y_TD = torch.empty_like(x_TD)
        self._norm[x_TD.dtype](
            x_TD.data_ptr(), num_rows, width, weight_D.data_ptr(), eps, y_TD.data_ptr(), torch.get_num_threads()
        )
        return y_TD

    def position(
        self, projected_TP: torch.Tensor, num_query_heads: int, kv: LayerKv, slots_T: IntArray, changes: PositionChanges
    ) -> torch.Tensor:
        """Stores keys and values and returns the queries, [T, H * A], all as the layer changes them.

        projected_TP has query heads, key heads, value heads. slots_T: block * block size + place in the block.
        """
        num_tokens = projected_TP.shape[0]
        assert projected_TP.dtype == kv.keys_BKSD.dtype, "keys of another dtype than the cache's"
        q_TP = projected_TP.new_empty(num_tokens, num_query_heads * kv.head_dim)
        rotation, eps = changes.rotation, changes.norm_eps
        self._position[projected_TP.dtype](
            projected_TP.data_ptr(), num_tokens, num_query_heads, *_cache(kv), slots_T.ctypes.data,
            None if rotation is None else rotation.cos_TJ.data_ptr(),
            None if rotation is None else rotation.sin_TJ.data_ptr(),
            -1.0 if eps is None else eps,
            None if changes.temperature_T is None else changes.temperature_T.data_ptr(),
            q_TP.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return q_TP

    def attend(
        self,
        q_TP: torch.Tensor,
        num_query_heads: int,
        kv: LayerKv,
        tiles_N4: IntArray,
        tables: IntArray,
        *,
        log_sum_exp_TH: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, H * A] of queries [T, H * A], scaled by A ** -0.5 here. A tile is (first token, number of tokens,
        positions that the first of them sees, where its blocks begin in tables). log_sum_exp_TH is filled."""
        out_TP = torch.empty_like(q_TP)
        status = self._attend[q_TP.dtype](
            q_TP.data_ptr(), num_query_heads, *_cache(kv), tiles_N4.ctypes.data, len(tiles_N4), tables.ctypes.data,
            kv.head_dim**-0.5, out_TP.data_ptr(),
            None if log_sum_exp_TH is None else log_sum_exp_TH.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if status:
            raise MemoryError("no memory for a kernel's workspace")
        return out_TP

    def largest_of_rows(self, rows_LV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's largest number, float32 and NaN if the row has one, and where it first is."""
        num_rows, width = rows_LV.shape
        largest_L = torch.empty(num_rows, dtype=torch.float32)
        places_L = torch.empty(num_rows, dtype=torch.int64)
        self._largest(
            rows_LV.data_ptr(), num_rows, width, largest_L.data_ptr(), places_L.data_ptr(), torch.get_num_threads()
        )
        return largest_L, places_L


def _function(library: ctypes.CDLL, name: str, *argument_types: Any) -> Any:
    function = getattr(library, name)
    function.argtypes = list(argument_types)
    return function


def _cache(kv: LayerKv) -> tuple[int, ...]:
    return kv.keys_BKSD.data_ptr(), kv.values_BKSD.data_ptr(), *kv.keys_BKSD.shape[1:]


@cache
def layer_kernels() -> LayerKernels | None:
    """None where there are none to be had; the log says why."""
    if not kernels_are_wanted():
        return None
    try:
        return LayerKernels(load_library("layers", SOURCES, [HEADERS]))
    except BuildError as error:
        logger.warning("no compiled kernels, attention is torch's and takes several times as long: %s", error)
        return None
