"""From the name of a model to a folder: local folders, and hub ids against a hub on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from local_hub import COMMIT, local_hub
from safetensors.torch import load_file

from cluster.checkpoints.presets import create_checkpoint
from experts.checkpoint import Checkpoint
from experts.checkpoint_error import CheckpointError
from experts.hub import resolve_model

REPO = "someone/Tiny-Scout"
# A new process: the hub's client reads its environment when it is imported.
RESOLVE = """
import sys
from experts.checkpoint_error import CheckpointError
from experts.hub import resolve_model
try:
    print(resolve_model(sys.argv[1]))
except CheckpointError as error:
    sys.exit(f"CheckpointError: {error}")
"""


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A repository as they are published: weights in shards, and files that we have no use for."""
    folder = create_checkpoint("tiny-scout", tmp_path / "published", max_shard_bytes=1_000_000)
    (folder / "README.md").write_text("about")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    (folder / "original" / "consolidated.00.pth").write_bytes(b"large")
    return folder


def resolve_in_a_process(model: str, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [sys.executable, "-c", RESOLVE, model], env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "someone" / "Tiny-Scout").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(REPO) == Path(REPO)


@pytest.mark.parametrize(
    "model", ["/nowhere/model", "./nowhere", "../nowhere", "a/b/c", "nowhere/", "~nobody/model", ""]
)
def test_a_path_that_is_no_hub_id_is_told_without_asking_a_hub(model: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"model {model}: no such folder") + "$"):
        resolve_model(model)


def test_a_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)

    with pytest.raises(CheckpointError, match=r"model model\.safetensors: wanted a folder, found a file"):
        resolve_model("model.safetensors")


def test_a_hub_id_becomes_a_folder_with_just_the_files_we_read(published: Path, tmp_path: Path) -> None:
    with local_hub(REPO, published) as hub:
        done = resolve_in_a_process(REPO, hub.endpoint, tmp_path / "home")
        assert done.returncode == 0, done.stderr
        served = set(hub.served)

    folder = Path(done.stdout.strip())
    assert folder.name == COMMIT
    assert "README.md" not in served
    assert not any(name.startswith("original/") for name in served)
    checkpoint = Checkpoint.open(folder)
    first_shard = load_file(sorted(published.glob("*.safetensors"))[0])
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in first_shard.items())
    assert (folder / "tokenizer.json").is_file()


def test_a_snapshot_that_is_here_serves_when_the_hub_is_gone(published: Path, tmp_path: Path) -> None:
    with local_hub(REPO, published) as hub:
        first = resolve_in_a_process(REPO, hub.endpoint, tmp_path / "home")
    second = resolve_in_a_process(REPO, hub.endpoint, tmp_path / "home")

    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout


def test_a_model_that_the_hub_does_not_know_is_told(published: Path, tmp_path: Path) -> None:
    with local_hub(REPO, published) as hub:
        done = resolve_in_a_process("someone/unknown", hub.endpoint, tmp_path / "home")

    assert done.returncode == 1
    assert "CheckpointError: model someone/unknown: no such folder, and the hub did not give it" in done.stderr
    assert "RepositoryNotFoundError" in done.stderr


def test_a_hub_that_does_not_answer_is_told(published: Path, tmp_path: Path) -> None:
    with local_hub(REPO, published) as hub:
        pass

    done = resolve_in_a_process(REPO, hub.endpoint, tmp_path / "home")

    assert done.returncode == 1
    assert f"CheckpointError: model {REPO}: no such folder, and the hub did not give it" in done.stderr
    assert "Traceback" not in done.stderr
