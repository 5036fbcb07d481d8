"""Compiles C kernels for the processor at hand, once, and loads them.

The result is kept in the user's cache folder under a name made of everything it depends on, so a change of source,
compiler or processor makes another one. Where that folder cannot be written, each process compiles for itself. The
kernels' OpenMP is the one that torch has loaded: there is one team of threads in a process, not two that spin against
one another.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
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

logger = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """There are no kernels, and why."""


class NoCompilerError(BuildError):
    """Nothing here compiles C as GCC does, whose vector extension the kernels are written in."""


def load_library(name: str, sources: Sequence[Path], include: Sequence[Path] = ()) -> ctypes.CDLL:
    """The kernels of ``sources``, compiled if need be. Headers lie beside the sources or in ``include``.

    Raises BuildError.
    """
    compiler, version = find_compiler()
    file_name = f"{name}-{_fingerprint(version, sources, include)}.so"
    folder = cache_folder()
    kept = None if folder is None else folder / file_name
    if kept is not None and kept.exists():
        try:
            return _load(kept)
        except OSError as error:
            logger.warning("kernels are compiled anew, what was kept is broken: %s", error)
    try:
        with tempfile.TemporaryDirectory(prefix="arriero-kernels-") as work:
            built = _compile(compiler, sources, include, Path(work) / file_name)
            return _load(kept if kept is not None and _keep(built, kept) else built)
    except OSError as error:
        raise BuildError(f"{name}: {error}") from error


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    logger.info("compiled kernels: %s", path)
    return library


def find_compiler() -> tuple[str, str]:
    """Its path, and what it says of its version. Raises NoCompilerError."""
    for command in COMPILERS:
        if (path := shutil.which(command)) is not None and "Free Software Foundation" in (version := _version(path)):
            return path, version
    raise NoCompilerError(f"there is no GNU C compiler ({' or '.join(COMPILERS)})")


def cache_folder() -> Path | None:
    """None for a user without a home."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "arriero"
    try:
        return Path.home() / ".cache" / "arriero"
    except RuntimeError:
        return None


def _version(compiler: str) -> str:
    try:
        return _run([compiler, "--version"])
    except BuildError as error:
        # What stands at this path may be anything; the next may do.
        logger.info("%s", error)
        return ""


def _fingerprint(compiler_version: str, sources: Sequence[Path], include: Sequence[Path]) -> str:
    folders = dict.fromkeys([*(source.parent for source in sources), *include])
    headers = sorted(header for folder in folders for header in folder.glob("*.h"))
    digest = hashlib.sha256(" ".join((*COMPILE, *LINK, *platform.libc_ver())).encode())
    digest.update(compiler_version.encode())
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


def _compile(compiler: str, sources: Sequence[Path], include: Sequence[Path], path: Path) -> Path:
    objects = []
    for source in sources:
        objects.append(str(path.parent / f"{source.stem}.o"))
        # The source's own folder, too: a header that lies elsewhere may include what lies beside the source.
        headers = [f"-I{each}" for each in (source.parent, *include)]
        _run([compiler, *COMPILE, *headers, "-c", str(source), "-o", objects[-1]])
    _run([compiler, *objects, *LINK, "-o", str(path)])
    return path


def _keep(built: Path, kept: Path) -> bool:
    """The file appears whole or not at all: several processes may come here at once, each with the same one."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            os.replace(shutil.copy(built, folder), kept)
    except OSError as error:
        logger.warning("compiled kernels are not kept, each process compiles them (seconds): %s", error)
        return False
    return True


def _run(command: Sequence[str]) -> str:
    """What it says. Raises BuildError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not end within {TIMEOUT_S:g} s") from error
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout
