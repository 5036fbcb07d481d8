"""`arriero serve` as a subprocess, and the means to prove that nothing of it is left."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from conditions import free_port, wait_until

MARK = "ARRIERO_TEST_RUN"
READY_TIMEOUT_S = 120.0
GONE_TIMEOUT_S = 30.0


def living(mark: str) -> dict[int, str]:
    """Pid and command line of every living process that carries the mark in its environment."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # ended, or a zombie, or another user's
    return found


class ServeProcess:
    """Every process it starts, however far down, inherits a mark in its environment."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        self.mark = secrets.token_hex(8)
        self.log = folder / "log"
        self.state_home = folder / "state"
        self.grpc_port, self.http_port = free_port(), free_port()
        # Short: the paths of Ray's sockets must fit into 107 bytes.
        self._temp_folder = tempfile.mkdtemp(prefix="ar", dir="/tmp")
        environment = {
            **os.environ,
            MARK: self.mark,
            "XDG_STATE_HOME": str(self.state_home),
            "TMPDIR": self._temp_folder,
        }
        # The service shall choose by itself, as for a user.
        environment.pop("RAY_AUTH_MODE", None)
        ports = ["--grpc-port", str(self.grpc_port), "--http-port", str(self.http_port)]
        with self.log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", "serve", *ports, *arguments],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
            )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def ready_line(self) -> str:
        """Blocks until the first line on stdout; empty when the process ended without one."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self) -> str:
        """Waits for the process; returns what it still wrote to stdout."""
        stdout, _ = self.process.communicate(timeout=READY_TIMEOUT_S)
        return stdout

    def living(self) -> dict[int, str]:
        return living(self.mark)

    def wait_until_gone(self) -> None:
        wait_until(lambda: not self.living(), f"all processes of {self.process.args!r} gone", GONE_TIMEOUT_S)

    def temp_files(self) -> list[Path]:
        """What it has left of its temporary folders."""
        return list(Path(self._temp_folder).iterdir())

    def close(self) -> None:
        """Ends it by force where it still runs, and takes its files away."""
        self.process.kill()
        self.process.wait()
        self.wait_until_gone()
        shutil.rmtree(self._temp_folder)

    def __enter__(self) -> ServeProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
