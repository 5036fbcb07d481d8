"""What the processes of the session's Ray have logged: ours as they wrote it, one file per process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray


def lines() -> Iterator[str]:
    for path in Path(ray._private.worker._global_node.get_logs_dir_path()).glob("worker-*.err"):
        yield from path.read_text(errors="replace").splitlines()


def json_lines(**wanted: object) -> list[dict[str, Any]]:
    """Those of services with log_format=json that have these values."""
    found = (json.loads(line) for line in lines() if line.startswith('{"time"'))
    return [line for line in found if wanted.items() <= line.items()]
