"""A TCP proxy whose connections a test can cut: the broken network between a client and its server."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

CHUNK_BYTES = 65536
# Closes with a reset and without a farewell, as a machine does whose process was killed.
LINGER_RESET = struct.pack("ii", 1, 0)


class CuttableProxy:
    """Listens on a free port and passes every connection on to server_port of this machine."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self.port: int = self._listener.getsockname()[1]
        self.num_cut = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Resets every connection that is open; new ones are passed on again."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            self.num_cut += 1
            for end in pair:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._server_port))
            with self._lock:
                self._pairs.append((client, server))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(CHUNK_BYTES):
            sink.sendall(chunk)
        sink.shutdown(socket.SHUT_WR)
