"""`arriero checkpoint create`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster import cli
from experts.checkpoint import Checkpoint


def create(out: Path, *arguments: str) -> int:
    return cli.main(["checkpoint", "create", "--preset", "tiny-scout", "--out", str(out), *arguments])


def test_creates_a_checkpoint_and_prints_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert create(tmp_path / "model", "--seed", "5", "--expert-skew", "0.8:2") == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'model'}\n"
    assert captured.err == "", "no bar where there is no terminal"
    assert Checkpoint.open(tmp_path / "model").names()


def test_a_terminal_sees_a_progress_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Makes rich take the captured stderr for a terminal.
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert create(tmp_path / "model") == 0
    assert re.search(r"weights.*100%", capsys.readouterr().err)


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("x")
    assert create(tmp_path) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("skew", ["2", "0.5:99", "1.5:1", "x:1"])
def test_a_bad_skew_is_refused_by_name(tmp_path: Path, skew: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert create(tmp_path / "model", "--expert-skew", skew) == 2
    said = capsys.readouterr().err
    assert "skew" in said
    assert "Traceback" not in said
    assert not (tmp_path / "model").exists()
