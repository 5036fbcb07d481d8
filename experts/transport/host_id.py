"""Which host this is, as far as sharing memory goes. Free of torch."""

from __future__ import annotations

import os
from pathlib import Path


def host_id() -> str | None:
    """The same for two processes that can reach each other's abstract Unix sockets; None where there are none.

    A kernel's boot id and the network namespace: two containers on one machine have different ones and talk over
    TCP. Clones of a virtual machine may share both; then connecting fails, and they talk over TCP, too.
    """
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot_id} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        # Not Linux, or a /proc that is not for us to read.
        return None
