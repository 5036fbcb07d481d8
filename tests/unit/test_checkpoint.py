"""Reading a checkpoint folder: what it returns, and how each way of being broken is told."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from experts.checkpoint import PIECE_BYTES, Checkpoint, CheckpointError
from experts.expert_shape import ExpertShape
from experts.linear import pack_linear
from experts.mlp import Mlp
from experts.placement import Slot
from experts.weights import expert_tensor_names, load_expert, load_slots, validate_experts

SHAPE = ExpertShape(hidden_size=8, intermediate_size=12, num_experts=3)
LAYER = 1
GATE_UP, DOWN = expert_tensor_names(LAYER)


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        GATE_UP: torch.randn(3, 8, 24, generator=generator),
        DOWN: torch.randn(3, 12, 8, generator=generator),
        "model.norm.weight": torch.randn(8, generator=generator),
        "scalar": torch.tensor(2.5),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], *, nested: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    prefix = "language_model." if nested else ""
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    config: dict[str, Any] = {"model_type": "llama4", "text_config": {}} if nested else {"model_type": "llama4_text"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """One file per tensor."""
    write_folder(folder, tensors)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        weight_map[name] = f"model-{number}.safetensors"
        save_file({name: tensor}, folder / weight_map[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def with_header(folder: Path, header: bytes, data: bytes = b"") -> Path:
    write_folder(folder, weights())
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    return folder


def test_generation_config_json_is_read_where_there_is_one(tmp_path: Path) -> None:
    write_folder(tmp_path, weights())
    assert Checkpoint.open(tmp_path).generation_config == {}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [6, 7]}')
    assert Checkpoint.open(tmp_path).generation_config == {"eos_token_id": [6, 7]}
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not valid JSON"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_come_back_as_the_library_wrote_them(tmp_path: Path, dtype: torch.dtype, nested: bool) -> None:
    tensors = weights(dtype)
    checkpoint = Checkpoint.open(write_folder(tmp_path, tensors, nested=nested))

    assert checkpoint.names() == tuple(sorted(tensors))
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == dtype
        assert torch.equal(read, tensor)


def test_a_sharded_checkpoint_reads_like_a_single_file(tmp_path: Path) -> None:
    tensors = weights()
    checkpoint = Checkpoint.open(write_sharded(tmp_path, tensors))

    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_vision_tensors_are_not_names_of_the_text_part(tmp_path: Path) -> None:
    write_folder(tmp_path, weights(), nested=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "vision_model.class_embedding": torch.zeros(4)}, tmp_path / "model.safetensors")

    assert Checkpoint.open(tmp_path).names() == tuple(sorted(weights()))


@pytest.mark.parametrize("index", [0, 2, slice(1, 3), slice(None, 1), slice(3, 3)])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_part_of_the_first_axis_is_read_alone(tmp_path: Path, index: int | slice, dtype: torch.dtype | None) -> None:
    tensors = weights()
    checkpoint = Checkpoint.open(write_folder(tmp_path, tensors))

    part = checkpoint.read(GATE_UP, index=index, dtype=dtype)

    assert torch.equal(part, tensors[GATE_UP][index].to(dtype or torch.float32))
    assert checkpoint.bytes_read == tensors[GATE_UP][index].numel() * 4


def test_a_tensor_of_many_pieces_is_converted_exactly(tmp_path: Path) -> None:
    large = torch.randn(3, PIECE_BYTES // 5).to(torch.bfloat16)
    checkpoint = Checkpoint.open(write_folder(tmp_path, {"large": large}))

    assert torch.equal(checkpoint.read("large", dtype=torch.float32), large.float())


def test_pieces_of_an_entry_join_to_the_entry(tmp_path: Path) -> None:
    large = torch.randn(2, 700, PIECE_BYTES // 1000)
    checkpoint = Checkpoint.open(write_folder(tmp_path, {"large": large}))

    pieces = [(start, piece.clone()) for start, piece in checkpoint.read_pieces("large", index=1)]

    assert len(pieces) > 2
    assert [start for start, _ in pieces] == [sum(len(piece) for _, piece in pieces[:n]) for n in range(len(pieces))]
    assert torch.equal(torch.cat([piece for _, piece in pieces]), large[1])


@pytest.mark.parametrize(("name", "index"), [(GATE_UP, 3), (GATE_UP, -1), (GATE_UP, slice(0, 3, 2)), ("scalar", 0)])
def test_an_index_outside_the_tensor_is_refused(tmp_path: Path, name: str, index: int | slice) -> None:
    checkpoint = Checkpoint.open(write_folder(tmp_path, weights()))

    with pytest.raises(ValueError, match=name):
        checkpoint.read(name, index=index)


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def truncate(name: str, num_bytes: int) -> Callable[[Path], Any]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - num_bytes)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (remove("config.json"), ["config.json", "No such file"]),
        (write("config.json", "{"), ["config.json", "not valid JSON"]),
        (write("config.json", "[]"), ["config.json", "wanted a JSON object"]),
        (write("config.json", '{"model_type": "mixtral"}'), ["config.json", "'mixtral'", "llama4_text"]),
        (write("config.json", '{"model_type": ["llama4"]}'), ["config.json", "unknown architecture"]),
        (remove("model.safetensors.index.json"), ["neither model.safetensors.index.json nor model.safetensors"]),
        (write("model.safetensors.index.json", "nonsense"), ["model.safetensors.index.json", "not valid JSON"]),
        (write("model.safetensors.index.json", "{}"), ["model.safetensors.index.json", "weight_map"]),
        (
            write("model.safetensors.index.json", '{"weight_map": {"a": "../model-0.safetensors"}}'),
            ["model.safetensors.index.json", "../model-0.safetensors"],
        ),
        (
            write("model.safetensors.index.json", '{"weight_map": {"absent": "model-0.safetensors"}}'),
            ["model-0.safetensors", "tensor absent is missing"],
        ),
        (remove("model-1.safetensors"), ["model-1.safetensors", "No such file"]),
        (truncate("model-1.safetensors", 1), ["model-1.safetensors", "truncated", DOWN]),
        (write("model-1.safetensors", ""), ["model-1.safetensors", "truncated", "at least 8 bytes"]),
        (write("model-1.safetensors", "not a model at all"), ["model-1.safetensors", "not a safetensors file"]),
    ],
)
def test_a_damaged_folder_is_told_when_it_is_opened(
    tmp_path: Path, damage: Callable[[Path], Any], told: list[str]
) -> None:
    folder = write_sharded(tmp_path, weights())
    damage(folder)

    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)

    assert time.monotonic() - start < 1.0
    for part in [str(folder), *told]:
        assert part in str(caught.value)


def entry(**changes: Any) -> bytes:
    fields = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes
    return json.dumps({"odd": {name: value for name, value in fields.items() if value is not None}}).encode()


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"odd": 3}', "tensor odd: wanted dtype"),
        (entry(dtype=None), "tensor odd: wanted dtype"),
        (entry(data_offsets=[0]), "tensor odd: wanted dtype"),
        (entry(dtype="F4"), "tensor odd: unsupported dtype 'F4'"),
        (entry(dtype=["F32"]), "tensor odd: unsupported dtype"),
        (entry(shape=[2, -3]), "tensor odd: shape and data_offsets must be counts"),
        (entry(shape=["2", 3]), "tensor odd: shape and data_offsets must be counts"),
        (entry(data_offsets=[-24, 0]), "tensor odd: shape and data_offsets must be counts"),
        (entry(data_offsets=[0, 20]), r"tensor odd: F32 \[2, 3\] takes 24 bytes"),
        (entry(shape=[2, 30], data_offsets=[0, 240]), "truncated: tensor odd ends at byte"),
    ],
)
def test_a_header_that_cannot_be_true_is_told(tmp_path: Path, header: bytes, told: str) -> None:
    with_header(tmp_path, header, b"\0" * 24)

    with pytest.raises(CheckpointError, match=told):
        Checkpoint.open(tmp_path)


def test_a_header_longer_than_its_file_is_told(tmp_path: Path) -> None:
    write_folder(tmp_path, weights())
    (tmp_path / "model.safetensors").write_bytes((1000).to_bytes(8, "little") + b"{}")

    with pytest.raises(CheckpointError, match="truncated: the header needs 1008 bytes, the file has 10"):
        Checkpoint.open(tmp_path)


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: no such folder"):
        Checkpoint.open(tmp_path / "absent")


def test_a_file_cut_short_after_it_was_opened_is_told(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_folder(tmp_path, weights()))
    os.truncate(tmp_path / "model.safetensors", checkpoint.info(DOWN).offset + 4)

    with pytest.raises(CheckpointError, match=rf"tensor {DOWN}: the file ended"):
        checkpoint.read(DOWN)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({DOWN: None}, [DOWN, "is missing"]),
        ({DOWN: torch.zeros(3, 8, 12)}, [DOWN, "wanted [3, 12, 8], found [3, 8, 12]"]),
        ({GATE_UP: torch.zeros(2, 8, 24)}, [GATE_UP, "wanted [3, 8, 24], found [2, 8, 24]"]),
        ({GATE_UP: torch.zeros(3, 8, 24).to(torch.float8_e4m3fn)}, [GATE_UP, "unsupported dtype torch.float8_e4m3fn"]),
        ({GATE_UP: torch.zeros(3, 8, 24, dtype=torch.int8)}, [GATE_UP, "unsupported dtype torch.int8"]),
    ],
)
def test_wrong_experts_are_told_before_a_weight_is_read(
    tmp_path: Path, changed: dict[str, torch.Tensor | None], told: list[str]
) -> None:
    tensors = {name: tensor for name, tensor in (weights() | changed).items() if tensor is not None}
    checkpoint = Checkpoint.open(write_folder(tmp_path, tensors))

    with pytest.raises(CheckpointError) as caught:
        validate_experts(checkpoint, [LAYER], SHAPE)
    with pytest.raises(CheckpointError):
        load_slots(checkpoint, [Slot(LAYER, 0)], SHAPE, dtype=torch.float32, device="cpu")

    assert checkpoint.bytes_read == 0
    for part in [str(tmp_path), *told]:
        assert part in str(caught.value)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_a_loaded_expert_is_bit_for_bit_the_one_of_the_whole_tensor(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    tensors = weights(stored)
    checkpoint = Checkpoint.open(write_folder(tmp_path, tensors))
    gate_up_IO, down_IO = tensors[GATE_UP][2].to(wanted), tensors[DOWN][2].to(wanted)
    plain = Mlp(
        gate=pack_linear(gate_up_IO[:, :12].T.contiguous()),
        up=pack_linear(gate_up_IO[:, 12:].T.contiguous()),
        down=pack_linear(down_IO.T.contiguous()),
    )

    expert = load_expert(checkpoint, Slot(LAYER, 2), SHAPE, dtype=wanted, device="cpu")

    x_RD = torch.randn(5, 8).to(wanted)
    assert torch.equal(expert(x_RD), plain(x_RD))
    assert expert.num_bytes == plain.num_bytes


def test_slots_are_loaded_once_each_with_progress(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_folder(tmp_path, weights()))
    seen: list[tuple[int, int]] = []
    slots = [Slot(LAYER, 2), Slot(LAYER, 0), Slot(LAYER, 2)]

    mlps = load_slots(
        checkpoint,
        slots,
        SHAPE,
        dtype=torch.float32,
        device="cpu",
        progress=lambda done, total: seen.append((done, total)),
    )

    assert set(mlps) == set(slots)
    assert seen == [(1, 2), (2, 2)]
    assert checkpoint.bytes_read == 2 * 3 * 8 * 12 * 4
