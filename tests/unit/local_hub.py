"""A model hub on this machine: as much of the hub's HTTP interface as a snapshot download needs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub(ThreadingHTTPServer):
    """Serves the files of one folder as the model ``repo_id``; every other model is unknown."""

    daemon_threads = True

    def __init__(self, repo_id: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo_id = repo_id
        self.folder = folder
        self.served: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def local_hub(repo_id: str, folder: Path) -> Iterator[LocalHub]:
    """A hub that runs for the length of the block."""
    hub = LocalHub(repo_id, folder)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        repo = self.server.repo_id
        if path == f"/api/models/{repo}/revision/main":
            siblings = [{"rfilename": name} for name in self._names()]
            self._send_json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings})
        elif path == f"/api/models/{repo}/tree/{COMMIT}":
            self._send_json([self._tree_entry(name) for name in self._names()])
        elif path.startswith(f"/{repo}/resolve/{COMMIT}/"):
            self._send_file(path.removeprefix(f"/{repo}/resolve/{COMMIT}/"))
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _names(self) -> list[str]:
        folder = self.server.folder
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def _tree_entry(self, name: str) -> dict[str, object]:
        content = (self.server.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": sha1(content).hexdigest()}

    def _send_file(self, name: str) -> None:
        content = (self.server.folder / name).read_bytes()
        if self.command == "GET":
            self.server.served.append(name)
        self._send(200, content, {"ETag": f'"{sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the tests look at what was served instead."""
