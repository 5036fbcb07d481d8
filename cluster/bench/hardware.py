"""What a benchmark ran on, as the machine itself tells it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# What decides which kernels a matmul gets.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "sve", "bf16")
PACKAGES = ("arriero", "torch", "numpy", "ray")


def describe_hardware() -> dict[str, str]:
    """Name to value, for people. What a system does not tell is left out."""
    cpu = _cpu(Path("/proc/cpuinfo"))
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    described = {
        "cpu": cpu.get("model name", platform.processor()),
        "cpu_family_model": " / ".join(filter(None, (cpu.get("cpu family"), cpu.get("model")))),
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "flags": " ".join(flag for flag in FLAGS if flag in flags),
        "memory": _memory(),
        "load_before": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }
    described |= {name: found for name in PACKAGES if (found := _version(name)) is not None}
    return {name: value for name, value in described.items() if value}


def _cpu(path: Path) -> dict[str, str]:
    """The first processor's lines."""
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n", maxsplit=1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _colon, value in pairs}


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
