"""`arriero serve` as its users meet it: a real service on a Ray cluster of its own, from ready line to Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import ray
from conftest import Cluster, actor_names, group_names, wait_until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray import serve
from serve_process import ServeProcess

from cluster.client import ArrieroClient
from cluster.client_types import ArrieroError, RetryPolicy, Sampling

pytestmark = pytest.mark.cluster

MAX_TOKENS = 12
# Each takes the command line a third of a second or more.
SETTLED_READS = 6
GREEDY = Sampling(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def service(tiny_maverick: Path, folder: Path) -> Iterator[ServeProcess]:
    """Ready, with two shards. The last test of this file ends it."""
    flags = ["--model", str(tiny_maverick), "--shards", "2", "--log-format", "json"]
    with ServeProcess(*flags, folder=folder) as service:
        expected = f"arriero ready grpc={service.address} http=127.0.0.1:{service.http_port}\n"
        assert service.ready_line() == expected, service.log.read_text()
        yield service


def arriero(service: ServeProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line as the user who started the service would use it."""
    environment = {**os.environ, "XDG_STATE_HOME": str(service.state_home)}
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def generate(service: ServeProcess, text: str) -> list[int]:
    with ArrieroClient(service.address) as client:
        return [token_id for piece in client.generate(text, sampling=GREEDY) for token_id in piece.token_ids]


def test_it_answers_over_grpc_as_generate_does_in_process(service: ServeProcess, tiny_maverick: Path) -> None:
    flags = ["--temperature", "0", "--max-tokens", "12", "--ignore-eos", "--json"]
    local = arriero(service, "generate", "--model", str(tiny_maverick), "--prompt", "Where do llamas live?", *flags)
    assert local.returncode == 0, local.stderr
    assert generate(service, "Where do llamas live?") == json.loads(local.stdout)["token_ids"]


def test_standard_health_says_serving(service: ServeProcess) -> None:
    with grpc.insecure_channel(service.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_status_finds_the_service_and_answers_within_a_second(service: ServeProcess) -> None:
    elapsed_s = []
    for _ in range(3):
        started_s = time.perf_counter()
        result = arriero(service, "status", "--json")
        elapsed_s.append(time.perf_counter() - started_s)
    assert result.returncode == 0, result.stderr
    view = json.loads(result.stdout)
    members_and_load = {"epoch", "controller", "gateways", "routers", "shards", "load"}
    assert set(view) == members_and_load | {"shard_growth", "weights_version", "model", "update"}
    assert view["epoch"] == 1
    assert [len(view[kind]) for kind in ("gateways", "routers", "shards")] == [1, 1, 2]
    members = [view["controller"], *view["gateways"], *view["routers"], *view["shards"]]
    assert {member["state"] for member in members} == {"ready"}
    assert {member["pid"] for member in members} <= service.living().keys()
    slots = sorted(tuple(slot) for shard in view["shards"] for slot in shard["slots"])
    assert slots == [(layer, expert) for layer in (1, 3, 5, 7) for expert in range(8)]
    assert min(elapsed_s) < 1.0, "the best of three, because the machine may be busy"


def settled_loads(service: ServeProcess) -> int:
    """The shards are asked twice a second: what earlier tests caused may still be on its way into the view."""
    history: list[int] = []

    def is_settled() -> bool:
        history.append(loads(service))
        return len(history) > SETTLED_READS and len(set(history[-SETTLED_READS:])) == 1

    wait_until(is_settled, "a load that stands still")
    return history[-1]


def test_status_shows_the_load_of_each_expert(service: ServeProcess) -> None:
    """One expert of each of four layers for every token that is computed; the last one drawn is not."""
    prompt = "Count my llamas"
    num_computed = 1 + len(prompt) + MAX_TOKENS - 1
    before = settled_loads(service)
    generate(service, prompt)
    wait_until(lambda: loads(service) == before + 4 * num_computed, "the load of the experts")


def loads(service: ServeProcess) -> int:
    view = json.loads(arriero(service, "status", "--json", "--address", f"localhost:{service.grpc_port}").stdout)
    return sum(tokens for _, _, tokens in view["load"])


def test_status_prints_a_table(service: ServeProcess) -> None:
    text = arriero(service, "status").stdout
    assert re.search(r"^shard +shard-0\S* +\d+ +\w+ +ready +16 +\d+$", text, re.MULTILINE), text


def test_rebalance_shows_what_it_would_do_and_does_nothing(service: ServeProcess) -> None:
    before = json.loads(arriero(service, "status", "--json").stdout)["shards"]
    result = arriero(service, "rebalance", "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    # A handful of requests says nothing about the load.
    assert answer["refusal"]["reason"] == "little_traffic"
    assert [shard["num_slots"] for shard in answer["before"]["shards"]] == [16, 16]
    assert "nothing to do (little_traffic): " in arriero(service, "rebalance", "--dry-run").stdout
    refused = arriero(service, "rebalance")
    assert refused.returncode == 2
    assert "FAILED_PRECONDITION: little_traffic: " in refused.stderr
    assert json.loads(arriero(service, "status", "--json").stdout)["shards"] == before


def test_the_admin_token_is_needed_and_private(service: ServeProcess) -> None:
    (record,) = (service.state_home / "arriero").glob("*.json")
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    environment = {**os.environ, "XDG_STATE_HOME": str(service.state_home), "ARRIERO_ADMIN_TOKEN": "wrong"}
    command = [sys.executable, "-m", "cluster.cli", "status"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert result.returncode == 1
    assert "UNAUTHENTICATED" in result.stderr


def test_the_log_of_a_service_is_json_whoever_wrote_it(service: ServeProcess) -> None:
    with ArrieroClient(service.address) as client:
        list(client.generate("for the log", sampling=GREEDY, request_id="for/the log"))

    def own_line() -> list[dict[str, object]]:
        lines = [json.loads(line) for line in service.log.read_text().splitlines()]
        return [line for line in lines if line.get("request_id") == "for/the log"]

    wait_until(own_line, "the request's line", timeout_s=30)
    assert [(line["logger"], line["status"], line["output_tokens"]) for line in own_line()] == [
        ("arriero.access", "OK", MAX_TOKENS)
    ]


def test_a_second_service_on_its_port_is_refused_at_once(service: ServeProcess, tiny_maverick: Path) -> None:
    started_s = time.perf_counter()
    result = arriero(service, "serve", "--model", str(tiny_maverick), "--grpc-port", str(service.grpc_port))
    assert result.returncode == 2
    assert result.stderr == (f"arriero serve: grpc_port: port {service.grpc_port} is already in use (on 0.0.0.0)\n")
    assert time.perf_counter() - started_s < 5
    assert generate(service, "still there?")


def test_a_start_that_fails_halfway_says_why_and_leaves_nothing(
    service: ServeProcess, tiny_maverick: Path, tmp_path: Path
) -> None:
    flags = ["--model", str(tiny_maverick), "--shards", "2", "--start-timeout-s", "0.01"]
    with ServeProcess(*flags, folder=tmp_path) as failing:
        assert failing.end() == ""
        assert failing.process.returncode == 1
        *_, where, why = failing.log.read_text().splitlines()
        assert re.fullmatch(r"arriero serve: shard-\d\S*: \w+ took longer than 0.01 s", why)
        assert where == f"arriero serve: logs and stack traces are in {failing.temp_files()[0]}"
        assert failing.living() == {}
        assert list(failing.state_home.glob("**/*.json")) == []
    assert generate(service, "still there?"), "the service beside it is unharmed"


def test_kill_minus_9_leaves_nothing(tiny_maverick: Path, tmp_path: Path) -> None:
    with ServeProcess("--model", str(tiny_maverick), "--shards", "2", folder=tmp_path) as killed:
        assert killed.ready_line().startswith("arriero ready"), killed.log.read_text()
        assert len(killed.living()) > 5
        killed.process.kill()
        killed.process.wait()
        killed.wait_until_gone()
        assert killed.temp_files() == []


def test_on_a_cluster_that_is_there_it_takes_down_only_what_is_its_own(
    cluster: Cluster, tiny_maverick: Path, tmp_path: Path
) -> None:
    ray_address = ray.get_runtime_context().gcs_address
    flags = ["--model", str(tiny_maverick), "--shards", "2", "--app-name", "guest", "--address", ray_address]
    with ServeProcess(*flags, folder=tmp_path) as guest:
        line = guest.ready_line()
        assert line == f"arriero ready grpc={cluster.grpc_address} http={cluster.http_address}\n", guest.log.read_text()
        with ArrieroClient(cluster.grpc_address, application="guest") as client:
            assert list(client.generate("as a guest", sampling=GREEDY))
        assert len(actor_names("guest:")) == 3, "a controller and two shards"
        guest.process.send_signal(signal.SIGTERM)
        assert guest.end() == ""
        assert guest.process.returncode == 0, guest.log.read_text()
        assert guest.living() == {}
    assert actor_names("guest:") == group_names("guest:") == set()
    assert "guest" not in serve.status().applications
    with urllib.request.urlopen(f"http://{cluster.http_address}/-/healthz", timeout=10) as response:
        assert response.status == 200, "Serve goes on"


def test_ctrl_c_in_the_middle_of_a_stream_ends_everything(service: ServeProcess) -> None:
    with ArrieroClient(service.address, retry=RetryPolicy(max_tries=1)) as client:
        stream = client.generate("a long one", sampling=Sampling(max_tokens=3000, ignore_eos=True))
        next(stream)
        service.process.send_signal(signal.SIGINT)
        with pytest.raises(ArrieroError):
            list(stream)
    assert service.end() == "", "the ready line is all that is ever on stdout"
    assert service.process.returncode == 0, service.log.read_text()
    assert service.living() == {}
    assert service.temp_files() == []
    assert list((service.state_home / "arriero").iterdir()) == []
    assert arriero(service, "status").returncode != 0
