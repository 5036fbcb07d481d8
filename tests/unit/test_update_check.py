"""What must be alike for one model to take another's place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.checkpoints.presets import create_checkpoint
from cluster.control.update_check import differences

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_checkpoint("tiny-maverick", tmp_path_factory.mktemp("served") / "m")


@pytest.fixture
def wanted(tmp_path: Path) -> Path:
    return create_checkpoint("tiny-maverick", tmp_path / "m", seed=1)


def edit(name: str, **values: object) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def test_other_weights_alone_are_no_difference(served: Path, wanted: Path) -> None:
    assert differences(served, wanted) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (edit("config.json", hidden_size=128), "hidden_size is 128, the service has "),
        (edit("config.json", rope_theta=7.0, rope_parameters=None), "rope is "),
        (edit("tokenizer.json", truncation={"max_length": 3}), "tokenizer.json is not the service's"),
        (edit("tokenizer_config.json", bos_token="<other>"), "bos_token in tokenizer_config.json is '<other>'"),
    ],
)
def test_each_difference_is_named(served: Path, wanted: Path, change: Change, told: str) -> None:
    change(wanted)
    assert any(sentence.startswith(told) for sentence in differences(served, wanted)), differences(served, wanted)


def test_a_folder_without_a_checkpoint_is_an_error(served: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        differences(served, tmp_path)
