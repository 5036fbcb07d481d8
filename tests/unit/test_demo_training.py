"""The script that trains the demo model, for one step."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import torch

from cluster.checkpoints.demo_model import demo_checkpoint
from experts.checkpoint import Checkpoint

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_demo" / "train.py"


def train(out: Path, seed: int) -> str:
    """The weights' digest."""
    arguments = ["--steps", "1", "--seed", str(seed), "--out", str(out)]
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "held out: sort" in done.stdout
    assert "CPU time" in done.stdout
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def test_a_seed_decides_the_weights_and_the_files_are_those_of_the_demo_model(tmp_path: Path) -> None:
    first, again, other = (train(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first == again
    assert first != other
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_text() == (demo_checkpoint() / name).read_text()
    assert shapes(tmp_path / "a") == shapes(demo_checkpoint())


def shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    checkpoint = Checkpoint.open(folder)
    return {name: (checkpoint.info(name).shape, checkpoint.info(name).dtype) for name in checkpoint.names()}
