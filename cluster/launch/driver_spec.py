"""What the command line tells the driver process: one JSON object on its stdin."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverSpec:
    """config is a ServiceConfig as plain values. ray_address None: a Ray cluster of our own, on this machine,
    whose logs and sockets live in temp_folder. parent_pid: the supervisor, whose end ends the driver too."""

    config: dict[str, Any]
    ray_address: str | None
    temp_folder: str
    parent_pid: int

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> DriverSpec:
        return cls(**json.loads(data))
