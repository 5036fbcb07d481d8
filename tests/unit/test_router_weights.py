"""The router's weights: which tensors, from which checkpoints, at what cost in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_runner import make_runner
from safetensors.torch import load_file, save_file
from tiny_models import MAVERICK, SCOUT, TOLERANCE, TinyModel, make_tiny, prompt

from experts.checkpoint import Checkpoint, CheckpointError
from router.config import ModelConfig
from router.model import Llama4Model
from router.weights import load_router, router_tensors, validate_router

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny(MAVERICK, tmp_path_factory.mktemp("maverick"))


def rewrite(tiny: TinyModel, folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Checkpoint:
    """A checkpoint folder with these tensors and config.json changed."""
    raw = json.loads((tiny.folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


def logits_of(tiny: TinyModel, checkpoint: Checkpoint) -> torch.Tensor:
    """With the model of ``checkpoint`` and the experts of ``tiny``."""
    config = ModelConfig.from_checkpoint_config(checkpoint.config)
    runner = make_runner(tiny)
    runner.model = Llama4Model(config, load_router(checkpoint, config, dtype=torch.float32, device=CPU))
    return runner.run(prompt(30, seed=1))


def test_router_and_experts_together_read_every_tensor(tiny: TinyModel) -> None:
    routed = {name for name in tiny.state if ".experts." in name}
    assert set(router_tensors(tiny.config)) == set(tiny.state) - routed


def test_only_the_routers_bytes_are_read(tiny: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny.folder)
    load_router(checkpoint, tiny.config, dtype=torch.float32, device=CPU)
    assert checkpoint.bytes_read == sum(checkpoint.info(name).num_bytes for name in router_tensors(tiny.config))


def test_nested_checkpoint_loads_its_text_part(tiny: TinyModel, tmp_path: Path) -> None:
    tensors = load_file(tiny.folder / "model.safetensors")
    nested = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    text = json.loads((tiny.folder / "config.json").read_text())
    nested["vision_model.class_embedding"] = torch.zeros(4)
    checkpoint = rewrite(tiny, tmp_path, nested, model_type="llama4", text_config=text)
    assert torch.equal(logits_of(tiny, checkpoint), make_runner(tiny).run(prompt(30, seed=1)))


def test_sharded_checkpoint_loads(tiny: TinyModel, tmp_path: Path) -> None:
    tiny.oracle.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(logits_of(tiny, checkpoint), make_runner(tiny).run(prompt(30, seed=1)))


def test_tied_embeddings_are_the_head(tmp_path: Path) -> None:
    tied = make_tiny(SCOUT | {"tie_word_embeddings": True, "num_hidden_layers": 4}, tmp_path)
    assert "lm_head.weight" not in Checkpoint.open(tmp_path).names()
    token_ids = prompt(40, seed=1)
    logits = make_runner(tied).run(token_ids)
    assert (logits - tied.oracle_logits(token_ids)).abs().max().item() <= TOLERANCE


def test_missing_tensor_is_named(tiny: TinyModel, tmp_path: Path) -> None:
    name = "model.layers.3.feed_forward.shared_expert.up_proj.weight"
    tensors = load_file(tiny.folder / "model.safetensors")
    del tensors[name]
    with pytest.raises(CheckpointError, match=name):
        validate_router(rewrite(tiny, tmp_path, tensors), tiny.config)


def test_wrong_shape_is_named_before_anything_is_read(tiny: TinyModel, tmp_path: Path) -> None:
    name = "model.layers.7.self_attn.k_proj.weight"
    tensors = load_file(tiny.folder / "model.safetensors")
    tensors[name] = tensors[name][:-1].contiguous()
    checkpoint = rewrite(tiny, tmp_path, tensors)
    with pytest.raises(CheckpointError, match=rf"{name}.*\[32, 64\].*\[31, 64\]"):
        load_router(checkpoint, tiny.config, dtype=torch.float32, device=CPU)
    assert checkpoint.bytes_read == 0


@pytest.mark.parametrize("tied", [False, True])
def test_progress_grows_to_the_total(tiny: TinyModel, tmp_path: Path, tied: bool) -> None:
    tensors = load_file(tiny.folder / "model.safetensors")
    if tied:
        del tensors["lm_head.weight"]
    checkpoint = rewrite(tiny, tmp_path, tensors, tie_word_embeddings=tied)
    config = ModelConfig.from_checkpoint_config(checkpoint.config)
    reports: list[tuple[int, int]] = []
    load_router(checkpoint, config, dtype=torch.float32, device=CPU, progress=lambda *report: reports.append(report))
    done, totals = zip(*reports, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == totals[-1]
    assert len(set(totals)) == 1


PUBLISHED = {
    "scout": ({"num_local_experts": 16, "interleave_moe_layer_step": 1}, 11_133_096_960),
    "maverick": ({"num_local_experts": 128, "interleave_moe_layer_step": 2}, 14_164_792_320),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_weights_outside_their_experts_as_counted(name: str) -> None:
    changes, num_weights = PUBLISHED[name]
    config = ModelConfig.from_checkpoint_config({"model_type": "llama4_text"} | changes)
    assert sum(torch.Size(shape).numel() for shape in router_tensors(config).values()) == num_weights


PEAK_PROGRAM = """
import sys, torch
from pathlib import Path
from experts.checkpoint import Checkpoint
from router.config import ModelConfig
from router.weights import load_router

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

checkpoint = Checkpoint.open(sys.argv[1])
config = ModelConfig.from_checkpoint_config(checkpoint.config)
torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))
before = status("VmRSS:")
weights = load_router(checkpoint, config, dtype=getattr(torch, sys.argv[2]), device=torch.device("cpu"))
print(status("VmHWM:") - before, status("VmRSS:") - before)
"""


def write_sparse_checkpoint(config: dict[str, Any], folder: Path) -> int:
    """Headers of a bfloat16 checkpoint over a file that is one hole. Returns the router's number of weights."""
    raw = config | {"model_type": "llama4_text"}
    (folder / "config.json").write_text(json.dumps(raw))
    header, end = {}, 0
    for name, shape in router_tensors(ModelConfig.from_checkpoint_config(raw)).items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    return end // 2


@pytest.mark.parametrize(("dtype", "num_bytes"), [("bfloat16", 2), ("float32", 4)])
def test_peak_memory_is_within_a_fifth_of_the_weights(tmp_path: Path, dtype: str, num_bytes: int) -> None:
    config = SCOUT | {
        "hidden_size": 1024,
        "head_dim": 128,
        "vocab_size": 16000,
        "intermediate_size": 2048,
        "intermediate_size_mlp": 4096,
        "num_hidden_layers": 16,
    }
    weight_bytes = num_bytes * write_sparse_checkpoint(config, tmp_path)
    program = [sys.executable, "-c", PEAK_PROGRAM, str(tmp_path), dtype]
    run = subprocess.run(program, timeout=120, check=True, capture_output=True, text=True)
    peak, _ = map(int, run.stdout.split())
    assert weight_bytes <= peak <= 1.2 * weight_bytes
