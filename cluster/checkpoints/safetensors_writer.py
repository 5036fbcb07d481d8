"""Writes safetensors shards of any size from pieces, so that no whole tensor need be in memory.

The header stands first in the file and holds only names, shapes and offsets; it is known before any value is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from experts.progress import Progress

ITEM_BYTES = {"F32": 4, "BF16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor to be written. ``dtype`` is the format's name for it: F32 or BF16."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def write_checkpoint_tensors(
    folder: Path,
    specs: Sequence[TensorSpec],
    pieces_of: Callable[[str], Iterable[torch.Tensor]],
    *,
    max_shard_bytes: int,
    progress: Progress | None = None,
) -> None:
    """Writes model.safetensors, or shards of at most ``max_shard_bytes`` (or one tensor) and their index.

    ``pieces_of(name)`` yields the tensor's values in order, in its dtype, each piece contiguous.
    """
    shards = _split(specs, max_shard_bytes)
    if progress is not None:
        pieces_of = _counted(pieces_of, sum(spec.num_bytes for spec in specs), progress)
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0], pieces_of)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file_name, shard, pieces_of)
        weight_map |= {spec.name: file_name for spec in shard}
    index = {"metadata": {"total_size": sum(spec.num_bytes for spec in specs)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _counted(
    pieces_of: Callable[[str], Iterable[torch.Tensor]], total_bytes: int, progress: Progress
) -> Callable[[str], Iterator[torch.Tensor]]:
    """The same pieces; progress hears of each when the next is asked for."""
    done_bytes = 0

    def counted(name: str) -> Iterator[torch.Tensor]:
        nonlocal done_bytes
        for piece in pieces_of(name):
            yield piece
            done_bytes += piece.nbytes
            progress(done_bytes, total_bytes)

    return counted


def _split(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    num_bytes = 0
    for spec in specs:
        if shards[-1] and num_bytes + spec.num_bytes > max_shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(spec)
        num_bytes += spec.num_bytes
    return shards


def header_of(specs: Sequence[TensorSpec]) -> bytes:
    """The file's first bytes: length and JSON header, padded with spaces to a multiple of eight."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.num_bytes
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _write_file(path: Path, specs: Sequence[TensorSpec], pieces_of: Callable[[str], Iterable[torch.Tensor]]) -> None:
    with path.open("wb") as file:
        file.write(header_of(specs))
        for spec in specs:
            start = file.tell()
            for piece in pieces_of(spec.name):
                file.write(piece.view(-1).view(torch.uint8).numpy().data)
            assert file.tell() - start == spec.num_bytes, f"the pieces of {spec.name} do not add up"
