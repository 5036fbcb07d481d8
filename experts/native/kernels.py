"""The compiled kernels for products with packed weights, as functions of tensors."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path

import torch

from experts.native.build import BuildError, load_library
from experts.native.quantized_layout import lay_out
from experts.quantize import QuantizedWeight
from experts.resident import resident_tensor

FOLDER = Path(__file__).parent
# "torch" turns the compiled kernels off: for comparison, and for whoever suspects them.
CHOICE = "ARRIERO_KERNELS"
Kind = tuple[torch.dtype, int | None]
DTYPES = {torch.float32: ("float", 1), torch.bfloat16: ("bfloat16", 2)}
LANES = 16
# Bits of quantised numbers, and what that is called in the names of the kernels.
FORMATS = {None: "", 8: "int8_", 4: "int4_"}

logger = logging.getLogger(__name__)

_POINTER, _COUNT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class PackedMatrix:
    """A weight [out, in] in the kernels' layout (matmul.c). bits: of its numbers where it is quantised; dtype: of what
    it is multiplied with."""

    def __init__(
        self, words: torch.Tensor, out_features: int, in_features: int, dtype: torch.dtype, bits: int | None = None
    ) -> None:
        self.words = words
        self.out_features = out_features
        self.in_features = in_features
        self.dtype = dtype
        self.bits = bits
        self.address = words.data_ptr()

    @property
    def num_bytes(self) -> int:
        """Without what fills up the last panel."""
        if self.bits is None:
            return self.out_features * self.in_features * self.dtype.itemsize
        return self.words.numel() * 4

    @property
    def kind(self) -> Kind:
        """Which kernels it is made for."""
        return self.dtype, self.bits


class ExpertKernels:
    """CPU tensors only, contiguous."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._pack, self._matmul, self._experts = {}, {}, {}
        for dtype, (name, _elements) in DTYPES.items():
            pack = getattr(library, f"pack_{name}")
            pack.argtypes = [_POINTER, _COUNT, _COUNT, _POINTER, _INT]
            pack.restype = None
            self._pack[dtype] = pack
        for (dtype, (name, _elements)), (bits, middle) in product(DTYPES.items(), FORMATS.items()):
            matmul = getattr(library, f"matmul_{middle}{name}")
            matmul.argtypes = [_POINTER, _COUNT, _POINTER, _COUNT, _COUNT, _POINTER, _POINTER, _POINTER, _INT]
            experts = getattr(library, f"experts_{middle}{name}")
            experts.argtypes = [
                _POINTER, _COUNT, _POINTER, _COUNT, _POINTER, _COUNT, _COUNT, _POINTER, _POINTER, _INT,
            ]  # fmt: skip
            self._matmul[dtype, bits], self._experts[dtype, bits] = matmul, experts

    def pack(self, weight_OI: torch.Tensor) -> PackedMatrix:
        """A copy in the kernels' layout."""
        weight_OI = weight_OI.contiguous()
        num_out, num_in = weight_OI.shape
        _name, elements = DTYPES[weight_OI.dtype]
        num_words = -(-num_out // LANES) * -(-num_in // elements) * LANES
        words = resident_tensor((num_words,), torch.int32)
        self._pack[weight_OI.dtype](weight_OI.data_ptr(), num_out, num_in, words.data_ptr(), torch.get_num_threads())
        return PackedMatrix(words, num_out, num_in, weight_OI.dtype)

    def pack_quantized(self, weight: QuantizedWeight) -> PackedMatrix:
        """A copy in the kernels' layout."""
        _name, elements = DTYPES[weight.dtype]
        num_out, num_in = weight.numbers_OI.shape
        return PackedMatrix(lay_out(weight, elements), num_out, num_in, weight.dtype, weight.bits)

    def matmul(
        self, x_RI: torch.Tensor, weight: PackedMatrix, *, added_RO: torch.Tensor | None = None, wide: bool = False
    ) -> torch.Tensor:
        """``x @ weight.T (+ added)`` [R, O], in x's dtype or, wide, in float32: as it was summed up."""
        num_rows, num_in = x_RI.shape
        # The kernel reads as much as the weight says there is.
        assert (x_RI.dtype, num_in) == (weight.dtype, weight.in_features), "rows that the weight is not made for"
        assert added_RO is None or (added_RO.dtype == weight.dtype and added_RO.is_contiguous())
        y_RO = torch.empty(num_rows, weight.out_features, dtype=torch.float32 if wide else weight.dtype)
        if num_rows:
            narrow_y, wide_y = (None, y_RO.data_ptr()) if wide else (y_RO.data_ptr(), None)
            added = None if added_RO is None else added_RO.data_ptr()
            _check(
                self._matmul[weight.kind](
                    x_RI.data_ptr(), num_rows, weight.address, weight.out_features, weight.in_features, added,
                    narrow_y, wide_y, torch.get_num_threads(),
                )
            )  # fmt: skip
        return y_RO

    def experts(
        self,
        x_RD: torch.Tensor,
        rows_per_expert: Sequence[int],
        experts: Sequence[tuple[PackedMatrix, PackedMatrix, PackedMatrix]],
        *,
        added_RD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``down(silu(gate(x)) * up(x)) (+ added)``: the first rows through the first expert, and so on.

        Each expert is its gate, up and down; all have the same shape and kind. Every count is at least 1.
        """
        y_RD = torch.empty_like(x_RD)
        spans = _spans(rows_per_expert)
        assert sum(rows_per_expert) == x_RD.shape[0], "each row has an expert"
        if x_RD.shape[0]:
            gate = experts[0][0]
            assert (x_RD.dtype, x_RD.shape[1]) == (gate.dtype, gate.in_features), "rows that experts are not made for"
            addresses = [matrix.address for expert in experts for matrix in expert]
            added = None if added_RD is None else added_RD.data_ptr()
            _check(
                self._experts[gate.kind](
                    x_RD.data_ptr(), x_RD.shape[0], (_COUNT * len(spans))(*spans), len(rows_per_expert),
                    (_POINTER * len(addresses))(*addresses), gate.in_features, gate.out_features, added,
                    y_RD.data_ptr(), torch.get_num_threads(),
                )
            )  # fmt: skip
        return y_RD


def _spans(rows_per_expert: Sequence[int]) -> list[int]:
    """Index of the expert, its first row and the one after its last, flat."""
    spans: list[int] = []
    start = 0
    for index, count in enumerate(rows_per_expert):
        spans += (index, start, start + count)
        start += count
    return spans


def _check(status: int) -> None:
    if status:
        raise MemoryError("no memory for a kernel's workspace")


def kernels_are_wanted() -> bool:
    """Whether compiled kernels are to be used at all. Raises ValueError for another choice than there is."""
    choice = os.environ.get(CHOICE, "native")
    if choice not in ("native", "torch"):
        raise ValueError(f"{CHOICE} must be native or torch, got {choice!r}")
    return choice == "native"


@cache
def expert_kernels(*, quantized: bool = False) -> ExpertKernels | None:
    """None where there are none to be had, or better ones, which quantised weights have nowhere; the log says why.
    Compiles them when they are asked for first."""
    if not kernels_are_wanted():
        return None
    if not quantized:
        if not _has_tiles():
            return expert_kernels(quantized=True)
        logger.info("products are oneDNN's, which knows this processor's matrix units (AMX)")
        return None
    try:
        return ExpertKernels(load_library("experts", [FOLDER / "matmul.c"]))
    except BuildError as error:
        logger.warning("no compiled kernels, products are torch's and take up to twice as long: %s", error)
        return None


def _has_tiles() -> bool:
    """Matrix units multiply many rows several times faster than vectors can; these kernels have only vectors."""
    return bool(torch.cpu._is_amx_tile_supported())
