"""Reading from a blocking socket while a connection is being opened. Free of torch: the token path uses it, too."""

from __future__ import annotations

import socket
import time


def read_exactly(sock: socket.socket, num_bytes: int, deadline: float) -> bytes:
    """deadline is of time.monotonic(). Raises TimeoutError past it, ConnectionResetError at the end of the stream."""
    received = b""
    while len(received) < num_bytes:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("timed out")
        sock.settimeout(remaining)
        chunk = sock.recv(num_bytes - len(received))
        if not chunk:
            raise ConnectionResetError("closed before it was open (another cluster's secret, or not whom we want?)")
        received += chunk
    return received
