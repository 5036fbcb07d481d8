"""The loaders on files with the exact headers of the published models, and what they read and hold."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import pytest
import torch
from published_headers import BEHEMOTH, MAVERICK, SCOUT, PublishedModel, tensor_shapes, write_sparse

from experts.checkpoint import Checkpoint
from experts.expert_shape import ExpertShape
from experts.linear import pack_linear
from experts.placement import Slot
from experts.weights import load_expert, validate_experts
from router.config import ModelConfig
from router.weights import validate_router

# Beside the slices: opening /proc/self/io itself, nothing more.
SLACK_BYTES = 4096


def characters_read() -> int:
    """Bytes that this process has passed to read-like system calls so far, from any file."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


def expert_shape(model: PublishedModel) -> ExpertShape:
    return ExpertShape(
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_experts=model.num_experts,
    )


@pytest.mark.parametrize(
    ("model", "num_tensors", "num_parameters"),
    [(SCOUT, 1133, 108_641_793_536), (MAVERICK, 1061, 401_583_781_376)],
    ids=["scout", "maverick"],
)
def test_the_headers_of_these_tests_are_those_of_the_published_models(
    model: PublishedModel, num_tensors: int, num_parameters: int
) -> None:
    shapes = tensor_shapes(model)

    assert len(shapes) == num_tensors
    assert sum(prod(shape) for shape in shapes.values()) == num_parameters


def test_the_behemoth_estimate_has_two_trillion_parameters() -> None:
    assert sum(prod(shape) for shape in tensor_shapes(BEHEMOTH).values()) // 10**9 == 2014


@pytest.mark.parametrize("model", [SCOUT, MAVERICK, BEHEMOTH], ids=["scout", "maverick", "behemoth"])
def test_loading_one_expert_of_two_layers_reads_only_its_bytes(model: PublishedModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_sparse(folder, tensor_shapes(model), model.config)
    pack_linear(torch.ones(16, 16))  # oneDNN looks at the machine once, through files.

    before_open = characters_read()
    checkpoint = Checkpoint.open(folder)
    opened = characters_read()
    header_bytes = sum(8 + int.from_bytes(path.open("rb").read(8), "little") for path in folder.glob("*.safetensors"))
    json_bytes = sum(path.stat().st_size for path in folder.glob("*.json"))
    # Buffered reads of the headers round up to the buffer's size.
    num_files = len(list(folder.glob("*.safetensors")))
    assert opened - before_open <= header_bytes + json_bytes + num_files * 8192 + SLACK_BYTES

    for layer in (model.moe_layers[0], model.moe_layers[-1]):
        before = characters_read()
        expert = load_expert(
            checkpoint,
            Slot(layer, model.num_experts - 1),
            expert_shape(model),
            dtype=torch.bfloat16,
            device="cpu",
        )
        slice_bytes = 3 * model.hidden_size * model.intermediate_size * 2
        assert expert.num_bytes == slice_bytes
        assert slice_bytes <= characters_read() - before <= slice_bytes + SLACK_BYTES
        del expert


@pytest.mark.parametrize("model", [SCOUT, MAVERICK], ids=["scout", "maverick"])
def test_published_headers_are_accepted_whole_within_a_second(model: PublishedModel, tmp_path: Path) -> None:
    write_sparse(tmp_path / "model", tensor_shapes(model), model.config)

    start = time.monotonic()
    checkpoint = Checkpoint.open(tmp_path / "model")
    config = ModelConfig.from_checkpoint_config(checkpoint.config)
    validate_router(checkpoint, config)
    validate_experts(checkpoint, config.moe_layers, config.expert_shape)

    assert time.monotonic() - start < 1.0
    assert checkpoint.bytes_read == 0
    assert config.moe_layers == model.moe_layers


MEASURE_LOADING = """
import json, sys
from pathlib import Path
import torch
from experts.checkpoint import Checkpoint
from experts.linear import pack_linear
from experts.placement import Slot
from experts.expert_shape import ExpertShape
from experts.weights import load_slots

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

folder, shape, num_slots, dtype = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4])
torch.set_num_threads(1)
pack_linear(torch.ones(64, 64, dtype=dtype))
checkpoint = Checkpoint.open(folder)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
before = status("VmRSS")
slots = [Slot(0, expert) for expert in range(num_slots)]
mlps = load_slots(checkpoint, slots, ExpertShape(**shape), dtype=dtype, device="cpu")
weights = sum(mlp.num_bytes for mlp in mlps.values())
print(json.dumps({"weights": weights, "peak": status("VmHWM") - before}))
"""


@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size", "num_slots", "dtype"),
    [
        (1024, 2048, 10, "bfloat16"),
        (1024, 2048, 10, "float32"),
        (512, 1024, 50, "bfloat16"),
        (5120, 8192, 2, "bfloat16"),
    ],
    ids=["middling", "widened to float32", "many small ones", "two of full size"],
)
def test_loading_experts_never_holds_more_than_their_weights_and_a_fifth(
    hidden_size: int, intermediate_size: int, num_slots: int, dtype: str, tmp_path: Path
) -> None:
    model = PublishedModel(
        num_layers=1, hidden_size=hidden_size, intermediate_size=intermediate_size, num_experts=num_slots + 2
    )
    write_sparse(tmp_path / "model", tensor_shapes(model), model.config)
    shape = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_experts": num_slots + 2}

    arguments = [str(tmp_path / "model"), json.dumps(shape), str(num_slots), dtype]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_LOADING, *arguments], capture_output=True, text=True, timeout=120, check=True
    )

    measured = json.loads(done.stdout)
    assert measured["weights"] == num_slots * 3 * hidden_size * intermediate_size * getattr(torch, dtype).itemsize
    assert measured["weights"] <= measured["peak"] <= 1.2 * measured["weights"]
