"""Compiling kernels where there is a compiler, a home and a cache, and where one of them is missing or broken."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_choice import kernels, require_compiler

from experts.linear import pack_linear
from experts.native import build
from experts.native.kernels import CHOICE, expert_kernels
from experts.torch_linear import OneDnnLinear
from router.native.kernels import layer_kernels


@pytest.fixture
def unchosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody has asked for kernels yet, nor says which; whether there is a compiler is the test's matter."""
    with kernels("torch"):
        monkeypatch.delenv(CHOICE)
        expert_kernels.cache_clear()
        layer_kernels.cache_clear()
        yield


@pytest.fixture(scope="module")
def compiler() -> None:
    require_compiler()


@pytest.fixture
def cache(compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "arriero"


@pytest.fixture
def source(compiler: None, tmp_path: Path) -> Path:
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    return path


def test_without_a_compiler_everything_is_torchs_and_the_log_says_so(
    unchosen: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _command: None)
    with caplog.at_level(logging.WARNING):
        linear = pack_linear(torch.eye(4))
        assert layer_kernels() is None
    assert isinstance(linear, OneDnnLinear)
    assert torch.equal(linear(torch.ones(3, 4)), torch.ones(3, 4))
    if not torch.cpu._is_amx_tile_supported():
        assert (
            "products are torch's and take up to twice as long: there is no GNU C compiler (gcc or cc)" in caplog.text
        )
    assert "attention is torch's" in caplog.text


def test_a_compiler_that_is_not_gnus_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in build.COMPILERS:
        script = tmp_path / command
        script.write_text("#!/bin/sh\necho clang version 19\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.NoCompilerError, match=r"there is no GNU C compiler \(gcc or cc\)"):
        build.find_compiler()


def test_a_compiler_that_fails_is_quoted(cache: Path, source: Path) -> None:
    source.write_text("this is no C\n")
    with pytest.raises(build.BuildError, match=r"answer\.c"):
        build.load_library("answer", [source])
    assert not cache.exists()


def test_another_source_makes_another_library(cache: Path, source: Path) -> None:
    for answer in (41, 42, 42):
        source.write_text(f"int answer(void) {{ return {answer}; }}\n")
        assert build.load_library("answer", [source]).answer() == answer
    assert len(list(cache.iterdir())) == 2


def test_what_is_kept_is_not_compiled_again(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.load_library("answer", [source])
    monkeypatch.setattr(build, "_compile", None)
    assert build.load_library("answer", [source]).answer() == 42


def test_a_broken_library_is_replaced(
    cache: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build.load_library("answer", [source])
    (elsewhere,) = cache.iterdir()
    broken = tmp_path / "other" / "arriero" / elsewhere.name
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"half a library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert build.load_library("answer", [source]).answer() == 42
    assert "what was kept is broken" in caplog.text
    assert broken.read_bytes() == elsewhere.read_bytes()


def test_where_nothing_can_be_kept_kernels_are_compiled_all_the_same(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Root may write anywhere, but not below a file.
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build.load_library("answer", [source]).answer() == 42
    assert "compiled kernels are not kept" in caplog.text


def test_a_user_without_a_home_compiles_for_the_process(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert build.load_library("answer", [source]).answer() == 42


def test_processes_that_compile_at_once_all_get_the_library(cache: Path, source: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from experts.native.build import load_library\n"
        "sys.stdin.readline()\n"
        f"print(load_library('answer', [Path({str(source)!r})]).answer())"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                         env=os.environ | {"XDG_CACHE_HOME": str(cache.parent)})
        for _ in range(4)
    ]  # fmt: skip
    for process in started:
        assert process.stdin is not None
        process.stdin.write("now\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[0].strip() for process in started] == ["42"] * 4
    assert len(list(cache.iterdir())) == 1


def test_another_choice_than_there_is_is_refused(unchosen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOICE, "fast")
    with pytest.raises(ValueError, match="ARRIERO_KERNELS must be native or torch, got 'fast'"):
        expert_kernels()
