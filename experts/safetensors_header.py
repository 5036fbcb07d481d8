"""The header of a safetensors file: which tensor lies where.

We parse it ourselves because the library maps the whole file and hands out views of the mapping: what a
process really reads is then up to the kernel's read-ahead, and pages of a mapping count as its memory. The
format is small: eight bytes of header length (little-endian), a JSON object of that length, then the data.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from experts.checkpoint_error import CheckpointError

# The limit of the safetensors library; a longer header is a damaged file.
MAX_HEADER_BYTES = 100_000_000

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies: ``num_bytes`` bytes, row-major, from byte ``offset`` of the file ``path``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file by their full names; reads nothing but the header.

    Raises CheckpointError if the file is missing, is no safetensors file, or is shorter than its header says.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header_bytes = _header_bytes(path, file.read(8), file_bytes)
            raw = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    data_start = 8 + header_bytes
    infos = {
        name: _tensor_info(path, name, entry, data_start)
        for name, entry in _parse(path, raw).items()
        if name != "__metadata__"
    }
    _check_extent(path, infos, file_bytes)
    return infos


def _header_bytes(path: Path, prefix: bytes, file_bytes: int) -> int:
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: truncated: a safetensors file has at least 8 bytes, found {len(prefix)}")
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: not a safetensors file: a header is at most {MAX_HEADER_BYTES} bytes, "
            f"this one claims {header_bytes}"
        )
    if 8 + header_bytes > file_bytes:
        raise CheckpointError(
            f"{path}: truncated: the header needs {8 + header_bytes} bytes, the file has {file_bytes}"
        )
    return header_bytes


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header must be a JSON object, found {type(header).__name__}")
    return header


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: tensor {name}: wanted dtype, shape and two data_offsets, found {entry!r}"
        ) from error
    if not isinstance(dtype_name, str) or dtype_name not in TORCH_DTYPES:
        raise CheckpointError(f"{path}: tensor {name}: unsupported dtype {dtype_name!r}")
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise CheckpointError(f"{path}: tensor {name}: shape and data_offsets must be counts, found {entry!r}")
    dtype = TORCH_DTYPES[dtype_name]
    num_bytes = prod(shape) * dtype.itemsize
    if end - begin != num_bytes:
        raise CheckpointError(
            f"{path}: tensor {name}: {dtype_name} {list(shape)} takes {num_bytes} bytes, "
            f"data_offsets {[begin, end]} give it {end - begin}"
        )
    return TensorInfo(name=name, dtype=dtype, shape=shape, path=path, offset=data_start + begin, num_bytes=num_bytes)


def _check_extent(path: Path, infos: dict[str, TensorInfo], file_bytes: int) -> None:
    for info in infos.values():
        end = info.offset + info.num_bytes
        if end > file_bytes:
            raise CheckpointError(
                f"{path}: truncated: tensor {info.name} ends at byte {end}, the file has {file_bytes}"
            )
