"""One Ray with Serve for the whole session, and applications on it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from conditions import WAIT_S, free_port, wait_until
from ray import serve

from cluster.app import build
from cluster.checkpoints.presets import create_checkpoint
from cluster.client import ArrieroClient
from cluster.control.shard_pool import NAMESPACE
from cluster.launch.ray_setup import GRPC_SERVICERS
from cluster.launch.token_file import state_folder

OBJECT_STORE_BYTES = 128 * 2**20
MEASURED = "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    grpc_address: str
    http_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A running application."""

    app_name: str
    model: Path
    cluster: Cluster

    def client(self) -> ArrieroClient:
        return ArrieroClient(self.cluster.grpc_address, application=self.app_name)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("application", self.app_name),)

    @property
    def admin_metadata(self) -> tuple[tuple[str, str], ...]:
        return (*self.metadata, ("authorization", f"Bearer {self.admin_token}"))

    @property
    def admin_token(self) -> str:
        [path] = state_folder().glob(f"{self.app_name}-*.json")
        return str(json.loads(path.read_text())["admin_token"])

    def view(self) -> dict[str, Any]:
        """As the controller has it."""
        controller = ray.get_actor(f"{self.app_name}:controller", namespace=NAMESPACE)
        view: dict[str, Any] = ray.get(controller.get_view.remote(), timeout=WAIT_S)
        return view


def actor_names(prefix: str) -> set[str]:
    """Named actors of ours that live, by the beginning of their names."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return {entry["name"] for entry in named if entry["namespace"] == NAMESPACE and entry["name"].startswith(prefix)}


def group_names(prefix: str) -> set[str]:
    """Placement groups that exist, by the beginning of their names."""
    table = ray.util.placement_group_table().values()
    return {entry["name"] for entry in table if entry["state"] != "REMOVED" and entry["name"].startswith(prefix)}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Ray with a temporary folder and ports of its own. Sixteen CPUs on paper: the tests' processes mostly wait."""
    # Short: Ray's socket paths must fit into 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="ar", dir="/tmp"))
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    ray.init(
        address="local",
        num_cpus=16,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.WARNING,
        _temp_dir=str(folder / "ray"),
        _node_ip_address="127.0.0.1",
    )
    http_port, grpc_port = free_port(), free_port()
    serve.start(
        http_options={"host": "127.0.0.1", "port": http_port},
        grpc_options={"port": grpc_port, "grpc_servicer_functions": list(GRPC_SERVICERS)},
    )
    yield Cluster(grpc_address=f"127.0.0.1:{grpc_port}", http_address=f"127.0.0.1:{http_port}")
    serve.shutdown()
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_maverick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_checkpoint("tiny-maverick", tmp_path_factory.mktemp("models") / "tiny-maverick")


RunApp = Callable[..., Any]


@pytest.fixture(scope="session")
def run_app(cluster: Cluster, tiny_maverick: Path) -> RunApp:
    """``with run_app("name", shards=2, ...) as service``: an application, deleted afterwards with all its parts."""

    @contextmanager
    def run(app_name: str, **config: Any) -> Iterator[Service]:
        values = {"model": str(tiny_maverick), "app_name": app_name, "dtype": "float32", "app_gone_s": 0.0, **config}
        values = {"drain_timeout_s": 5.0, "num_kv_blocks": 256, **values}
        try:
            serve.run(build(values), name=app_name, route_prefix=f"/{app_name}")
            yield Service(app_name=app_name, model=Path(values["model"]), cluster=cluster)
        finally:
            serve.delete(app_name)
            wait_until(lambda: not actor_names(f"{app_name}:"), f"{app_name}: controller and shards gone")

    return run


@pytest.fixture(scope="session")
def service(run_app: RunApp) -> Iterator[Service]:
    """What most tests talk to: two routers and three shards (the model has eight experts per layer)."""
    with run_app("shared", routers=2, shards=3) as running:
        yield running


Tell = Callable[[str], None]


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Tell:
    """What was measured, printed when all tests are done, whether this one passes or not."""
    return lambda message: record_property(MEASURED, message)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # Only here: what a test prints in a process of its own reaches nobody.
    reports = [report for key in ("passed", "failed") for report in terminalreporter.getreports(key)]
    told = [(report.nodeid, text) for report in reports for key, text in report.user_properties if key == MEASURED]
    if told:
        terminalreporter.section("measured")
    for node_id, text in told:
        terminalreporter.write_line(f"{node_id.partition('::')[2]}: {text}")
