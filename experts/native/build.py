"""Compiles C kernels for the processor at hand, once, and loads them.

The result is kept in the user's cache folder under a name made of everything it depends on, so a change of source,
compiler or processor makes another one. The kernels' OpenMP is the one that torch has loaded: there is one team of
threads in a process, not two that spin against one another.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

COMPILERS = ("gcc", "cc")
COMPILE = ("-O3", "-march=native", "-std=gnu11", "-fopenmp", "-fPIC", "-Wno-psabi", "-Wall", "-Wextra")
# Not linked with -fopenmp: the symbols are found among those of torch's own OpenMP library.
LINK = ("-shared", "-lm")
TIMEOUT_S = 300.0


class BuildError(RuntimeError):
    """There are no kernels, and why."""


def load_library(name: str, sources: Sequence[Path], include: Sequence[Path] = ()) -> ctypes.CDLL:
    """The kernels of ``sources``, compiled if need be. Headers lie beside the sources or in ``include``.

    Raises BuildError.
    """
    compiler = next((found for command in COMPILERS if (found := shutil.which(command))), None)
    if compiler is None:
        raise BuildError(f"there is no C compiler ({' or '.join(COMPILERS)})")
    try:
        path = cache_folder() / f"{name}-{_fingerprint(compiler, sources, include)}.so"
        if not path.exists():
            _compile(compiler, sources, include, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{name}: {error}") from error


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "arriero"


def _fingerprint(compiler: str, sources: Sequence[Path], include: Sequence[Path]) -> str:
    folders = dict.fromkeys([*(source.parent for source in sources), *include])
    headers = sorted(header for folder in folders for header in folder.glob("*.h"))
    digest = hashlib.sha256(" ".join((*COMPILE, *LINK)).encode())
    digest.update(_run([compiler, "--version"]).encode())
    digest.update(_processor().encode())
    for path in (*sources, *headers):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What -march=native looks at. A home folder may be shared by machines of different kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))


def _compile(compiler: str, sources: Sequence[Path], include: Sequence[Path], path: Path) -> None:
    """The file appears whole or not at all: several processes may come here at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = []
        for source in sources:
            objects.append(str(Path(folder) / f"{source.stem}.o"))
            headers = [f"-I{each}" for each in include]
            _run([compiler, *COMPILE, *headers, "-c", str(source), "-o", objects[-1]])
        library = str(Path(folder) / path.name)
        _run([compiler, *objects, *LINK, "-o", library])
        os.replace(library, path)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not end within {TIMEOUT_S:g} s") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout
