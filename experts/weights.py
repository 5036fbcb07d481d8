"""The weights of routed experts: their names, shapes and layout in a checkpoint, and how one is loaded.

A checkpoint keeps the experts of a layer fused, [E, in, out], gate and up side by side in the last axis. In
memory each is a matrix of its own, [out, in], packed for its kernel. An expert is read in small pieces that are
transposed straight into place, so while one is loaded the process holds it and at most a third more.

Shapes: E experts, D model width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from experts.checkpoint import Checkpoint
from experts.expert_dtype import QuantizedDtype
from experts.expert_shape import ExpertShape
from experts.linear import pack_linear
from experts.mlp import Mlp
from experts.placement import Slot
from experts.progress import Progress
from experts.scratch import scratch_tensor


def expert_tensor_names(layer: int) -> tuple[str, str]:
    """The fused tensors of a decoder layer: gate and up [E, D, 2F], down [E, F, D]."""
    prefix = f"model.layers.{layer}.feed_forward.experts"
    return f"{prefix}.gate_up_proj", f"{prefix}.down_proj"


def validate_experts(checkpoint: Checkpoint, layers: Iterable[int], shape: ExpertShape) -> None:
    """Raises CheckpointError if a layer's experts are missing, of another shape, or not floats. Reads no weight."""
    width, hidden = shape.hidden_size, shape.intermediate_size
    for layer in layers:
        gate_up, down = expert_tensor_names(layer)
        checkpoint.require(gate_up, (shape.num_experts, width, 2 * hidden))
        checkpoint.require(down, (shape.num_experts, hidden, width))


def load_expert(
    checkpoint: Checkpoint,
    slot: Slot,
    shape: ExpertShape,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantized: QuantizedDtype | None = None,
) -> Mlp:
    """Reads one expert's bytes and nothing else. quantized: as what it is kept, None as dtype. Raises CheckpointError
    as ``validate_experts`` and ``read`` do."""
    validate_experts(checkpoint, [slot.layer], shape)
    gate_up, down = expert_tensor_names(slot.layer)
    hidden = shape.intermediate_size
    gate_FD, up_FD = _read_transposed(checkpoint, gate_up, slot.expert, (hidden, hidden), dtype)
    gate = pack_linear(gate_FD.to(device), quantized)
    del gate_FD
    up = pack_linear(up_FD.to(device), quantized)
    del up_FD
    (down_DF,) = _read_transposed(checkpoint, down, slot.expert, (shape.hidden_size,), dtype)
    return Mlp(gate=gate, up=up, down=pack_linear(down_DF.to(device), quantized))


def load_slots(
    checkpoint: Checkpoint,
    slots: Sequence[Slot],
    shape: ExpertShape,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantized: QuantizedDtype | None = None,
    progress: Progress | None = None,
) -> dict[Slot, Mlp]:
    """Loads slots one after the other, in the order in which they lie on disk.

    All are checked before the first byte is read. ``progress(done, total)`` is called after each slot.
    """
    validate_experts(checkpoint, sorted({slot.layer for slot in slots}), shape)
    mlps: dict[Slot, Mlp] = {}
    for slot in sorted(set(slots)):
        mlps[slot] = load_expert(checkpoint, slot, shape, dtype=dtype, device=device, quantized=quantized)
        if progress is not None:
            progress(len(mlps), len(set(slots)))
    return mlps


def _read_transposed(
    checkpoint: Checkpoint, name: str, expert: int, out_widths: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """One expert's [in, out] matrix as contiguous [out, in] matrices, split along its out axis."""
    in_width = checkpoint.info(name).shape[1]
    matrices = tuple(scratch_tensor((out_width, in_width), dtype) for out_width in out_widths)
    straight, turned = torch.empty(0, dtype=dtype), torch.empty(0, dtype=dtype)
    for start, piece_IO in checkpoint.read_pieces(name, index=expert):
        num_in = len(piece_IO)
        if straight.numel() < num_in * max(out_widths):
            straight, turned = (scratch_tensor((num_in * max(out_widths),), dtype) for _ in range(2))
        for matrix_OI, part_IO in zip(matrices, torch.split(piece_IO, list(out_widths), dim=1), strict=True):
            # Transposing a contiguous piece by itself is three times as fast as copying into a strided place.
            out_width = part_IO.shape[1]
            straight_IO = straight[: part_IO.numel()].view(num_in, out_width).copy_(part_IO)
            turned_OI = turned[: part_IO.numel()].view(out_width, num_in).copy_(straight_IO.T)
            matrix_OI[:, start : start + num_in] = turned_OI
    return matrices
