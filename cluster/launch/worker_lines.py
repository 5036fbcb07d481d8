"""What Ray brings to the terminal, of its own and of other processes' output, as lines of JSON and nothing else.

Ray would put the process's name before each line, and then it is no JSON any more.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from experts.logs import JsonFormatter


def show_lines_as_json(process: str) -> None:
    """For this process of that name, which ray.init has connected."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    for name in ("ray", "ray.serve"):
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(JsonFormatter(process))
    dispatcher.remove_handler("ray_print_logs")
    dispatcher.add_handler("arriero_print_json", _print)


def _print(batch: Mapping[str, Any]) -> None:
    from ray._private.worker import filter_autoscaler_events

    if batch.get("pid") == "autoscaler":
        # It tells all that it thinks; like Ray, we show what comes of it.
        batch = {**batch, "lines": list(filter_autoscaler_events(batch["lines"]))}
    for line in json_lines(batch):
        print(line, file=sys.stderr)
    sys.stderr.flush()


def json_lines(batch: Mapping[str, Any]) -> Iterator[str]:
    """batch: Ray's, of one process. Our own lines as they are, others wrapped into objects of the same shape."""
    for line in batch.get("lines", ()):
        if _is_object(line):
            yield line
        elif line.strip():
            process = batch.get("actor_name") or batch.get("task_name") or "ray"
            yield json.dumps({"process": process, "pid": batch.get("pid"), "logger": "output", "message": line})


def _is_object(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
