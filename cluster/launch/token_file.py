"""Where a service of this machine can be reached and with which admin token: one private file per service.

The controller writes the file when it starts and removes it when it retires. `arriero status` reads the newest.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

FILE_MODE = 0o600
FOLDER_MODE = 0o700


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceRecord:
    """Addresses are host:port as seen from this machine; started_at is in Unix seconds."""

    app_name: str
    admin_token: str
    grpc_address: str
    http_address: str
    started_at: float

    @property
    def file_name(self) -> str:
        port = self.grpc_address.rpartition(":")[2]
        return f"{self.app_name}-{port}.json"


def state_folder() -> Path:
    """$XDG_STATE_HOME/arriero, by default ~/.local/state/arriero."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "arriero"


def write_record(record: ServiceRecord, folder: Path) -> Path:
    """Replaces the service's file as a whole; at no moment can anyone but the owner read the token."""
    folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    path = folder / record.file_name
    draft = folder / f".{record.file_name}.{os.getpid()}"
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(asdict(record), file)
    draft.replace(path)
    return path


def remove_record(record: ServiceRecord, folder: Path) -> None:
    """Leaves the file alone when another service has taken its place since."""
    path = folder / record.file_name
    if path.exists() and _read(path).admin_token == record.admin_token:
        path.unlink(missing_ok=True)


def find_record(folder: Path, address: str | None = None) -> ServiceRecord:
    """The service at ``address`` (host:port of its gRPC endpoint), or the one that was started last.

    Raises FileNotFoundError when there is none, ValueError for a file that is not ours.
    """
    records = [_read(path) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
    if address is not None:
        records = [record for record in records if record.grpc_address == _local(address)]
    if not records:
        wanted = "a service" if address is None else f"the service at {address}"
        raise FileNotFoundError(f"no record of {wanted} in {folder}: was it started on this machine by this user?")
    return max(records, key=lambda record: record.started_at)


def _local(address: str) -> str:
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in ("", "localhost", "0.0.0.0", "[::]", "[::1]") else address


def _read(path: Path) -> ServiceRecord:
    try:
        return ServiceRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not a service record: {error}") from error
