"""A Hugging Face checkpoint folder, read by byte range.

Opening reads config.json, the index and the headers only, so every fault that a header can show is found
within milliseconds and before any weight is read. A weight is then read with ``preadv`` into the memory of a
fresh tensor: exactly the bytes of the slice, no mapping and no copy of the whole tensor, because a fused expert
tensor can be far larger than the one expert a process wants of it (21.5 GB and 168 MB in the largest published
model). Why not the safetensors library: see safetensors_header.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch

from experts.checkpoint_error import CheckpointError as CheckpointError
from experts.safetensors_header import TensorInfo as TensorInfo
from experts.safetensors_header import read_header
from experts.scratch import scratch_tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# What comes before the names of the text part, by config.json's model_type.
TEXT_PREFIXES = {"llama4": "language_model.", "llama4_text": ""}

# Weights are floats of these types; others (quantised ones) would need scales that we do not read.
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Enough for a disk's full speed, and small against the weights that pass through.
PIECE_BYTES = 2 * 2**20


class Checkpoint:
    """The tensors of one model folder. Names are those of the text part, without ``text_prefix``."""

    def __init__(
        self,
        *,
        folder: Path,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        text_prefix: str,
        tensors: dict[str, TensorInfo],
    ) -> None:
        """Use ``open``. ``tensors`` is keyed by full names. generation_config is empty where there is no such file."""
        self.folder = folder
        self.config = config
        self.generation_config = generation_config
        self.text_prefix = text_prefix
        self.bytes_read = 0
        self._tensors = tensors

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Reads configuration and headers. Raises CheckpointError for anything missing, malformed or truncated."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        config = _read_json(folder / "config.json")
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in TEXT_PREFIXES:
            raise CheckpointError(
                f"{folder / 'config.json'}: unknown architecture: model_type is {model_type!r}, "
                f"wanted one of {', '.join(TEXT_PREFIXES)}"
            )
        generation_path = folder / "generation_config.json"
        return cls(
            folder=folder,
            config=config,
            generation_config=_read_json(generation_path) if generation_path.exists() else {},
            text_prefix=TEXT_PREFIXES[model_type],
            tensors=_read_tensors(folder),
        )

    def names(self) -> tuple[str, ...]:
        """The names of the text part, sorted."""
        prefix = self.text_prefix
        return tuple(sorted(name[len(prefix) :] for name in self._tensors if name.startswith(prefix)))

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies. Raises CheckpointError if there is none of that name."""
        full_name = self.text_prefix + name
        info = self._tensors.get(full_name)
        if info is None:
            raise CheckpointError(f"{self.folder}: tensor {full_name} is missing")
        return info

    def require(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """``info`` of a float tensor of exactly this shape; raises CheckpointError for any other."""
        info = self.info(name)
        if info.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{info.path}: tensor {info.name}: unsupported dtype {info.dtype}, "
                f"wanted one of {', '.join(str(dtype) for dtype in WEIGHT_DTYPES)}"
            )
        if info.shape != shape:
            raise CheckpointError(
                f"{info.path}: tensor {info.name}: wrong shape: wanted {list(shape)}, found {list(info.shape)}"
            )
        return info

    def read(self, name: str, *, index: int | slice | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor, or a part of its first axis, in memory of its own on the CPU.

        An integer index drops the axis; a slice must have step 1. With ``dtype`` the values are converted
        piece by piece, so that the peak is the result and one small piece. Raises CheckpointError if the file
        cannot be read or ends early, ValueError for an index that the tensor does not have.
        """
        info = self.info(name)
        shape, skipped = _part(info, index)
        if dtype is None or dtype == info.dtype:
            result = scratch_tensor(shape, info.dtype)
            self._read_into(result, info, skipped)
            return result
        result = scratch_tensor(shape, dtype)
        flat = result.view(-1)
        for start, piece in self._pieces(info, skipped, (len(flat),)):
            flat[start : start + len(piece)] = piece
        return result

    def read_pieces(self, name: str, *, index: int) -> Iterator[tuple[int, torch.Tensor]]:
        """One entry of the first axis in runs of whole rows, each with the number of rows before it.

        For callers that change the layout while they read: they never hold the checkpoint's layout in full.
        The runs share their memory: each is valid until the next is asked for.
        """
        info = self.info(name)
        shape, skipped = _part(info, index)
        yield from self._pieces(info, skipped, shape)

    def _pieces(self, info: TensorInfo, skipped: int, shape: tuple[int, ...]) -> Iterator[tuple[int, torch.Tensor]]:
        num_rows, row_shape = shape[0], shape[1:]
        row_elements = prod(row_shape)
        rows_per_piece = min(num_rows, max(1, PIECE_BYTES // max(1, row_elements * info.dtype.itemsize)))
        memory = scratch_tensor((rows_per_piece, *row_shape), info.dtype)
        for start in range(0, num_rows, max(1, rows_per_piece)):
            piece = memory[: num_rows - start]
            self._read_into(piece, info, skipped + start * row_elements)
            yield start, piece

    def _read_into(self, result: torch.Tensor, info: TensorInfo, skipped: int) -> None:
        """Fills a contiguous tensor with the elements that follow the first ``skipped``."""
        try:
            with FileIO(info.path) as file:
                self._fill(result, file, info, info.offset + skipped * info.dtype.itemsize)
        except OSError as error:
            raise CheckpointError(f"{info.path}: tensor {info.name}: {error.strerror}") from error

    def _fill(self, result: torch.Tensor, file: FileIO, info: TensorInfo, offset: int) -> None:
        buffer = result.view(-1).view(torch.uint8).numpy().data
        filled = 0
        # One call moves at most 2 GiB.
        while filled < len(buffer):
            num_bytes = os.preadv(file.fileno(), [buffer[filled:]], offset + filled)
            if num_bytes == 0:
                raise CheckpointError(
                    f"{info.path}: tensor {info.name}: the file ended at byte {offset + filled}, "
                    f"wanted {len(buffer) - filled} more bytes"
                )
            filled += num_bytes
            self.bytes_read += num_bytes


def _part(info: TensorInfo, index: int | slice | None) -> tuple[tuple[int, ...], int]:
    """Shape of the part that ``index`` selects, and the number of elements before it."""
    if index is None:
        return info.shape, 0
    if not info.shape:
        raise ValueError(f"tensor {info.name} has no axis to index, got {index!r}")
    length, row_shape = info.shape[0], info.shape[1:]
    if isinstance(index, int):
        if not 0 <= index < length:
            raise ValueError(f"tensor {info.name} has rows 0 to {length - 1}, got index {index}")
        return row_shape, index * prod(row_shape)
    start, stop, step = index.indices(length)
    if step != 1:
        raise ValueError(f"tensor {info.name}: a slice must have step 1, got {index!r}")
    return (max(stop - start, 0), *row_shape), start * prod(row_shape)


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    if (folder / INDEX_NAME).is_file():
        return _read_sharded(folder)
    if (folder / SINGLE_NAME).is_file():
        return read_header(folder / SINGLE_NAME)
    raise CheckpointError(f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME} is there")


def _read_sharded(folder: Path) -> dict[str, TensorInfo]:
    path = folder / INDEX_NAME
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path}: weight_map must be an object, found {type(weight_map).__name__}")
    for file_name in weight_map.values():
        # An index comes from outside; it must not lead out of the folder.
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(f"{path}: weight_map must name files of this folder, found {file_name!r}")
    headers = {file_name: read_header(folder / file_name) for file_name in sorted(set(weight_map.values()))}
    tensors: dict[str, TensorInfo] = {}
    for name, file_name in weight_map.items():
        if name not in headers[file_name]:
            raise CheckpointError(f"{folder / file_name}: tensor {name} is missing, {INDEX_NAME} promises it")
        tensors[name] = headers[file_name][name]
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: wanted a JSON object, found {type(value).__name__}")
    return value
