"""A machine that is to go empties itself first, under open streams, which may not notice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from answers import ask_all
from conftest import Cluster, RunApp, Service, Tell, wait_until
from crowd import ASKS, WHOLE_S, Crowd
from http_calls import send
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._raylet import GcsClient
from ray.exceptions import RayError

pytestmark = pytest.mark.cluster

# The cluster's first node has 16.
CPUS_OF_A_MEMBER = 17.0
CPUS_OF_A_NODE = 90
PREEMPTION = 2
DEADLINE_S = 300
POLL_S = 0.1
FEW = ASKS[:4]

AddNode = Callable[[], Node]


@pytest.fixture(scope="module")
def add_node(cluster: Cluster) -> Iterator[AddNode]:
    """Another raylet on this machine, large enough for members for which the first node is too small."""
    nodes: list[Node] = []

    def add() -> Node:
        parameters = RayParams(
            gcs_address=ray.get_runtime_context().gcs_address,
            node_ip_address="127.0.0.1",
            num_cpus=CPUS_OF_A_NODE,
            object_store_memory=128 * 2**20,
            min_worker_port=0,
            max_worker_port=0,
            node_manager_port=0,
            dashboard_agent_listen_port=None,
            include_log_monitor=False,
        )
        nodes.append(Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False))
        return nodes[-1]

    yield add
    for node in nodes:
        node.kill_all_processes(check_alive=False, allow_graceful=True)


@pytest.fixture(scope="module")
def first_node(add_node: AddNode) -> Node:
    return add_node()


@pytest.fixture(scope="module")
def moving(run_app: RunApp, first_node: Node) -> Iterator[Service]:
    options = {"router_num_cpus": CPUS_OF_A_MEMBER, "shard_num_cpus": CPUS_OF_A_MEMBER, "drain_timeout_s": 120.0}
    with run_app("moving", routers=2, shards=2, stream_interval_ms=0, **options) as service:
        yield service


@pytest.fixture(scope="module")
def undisturbed(moving: Service) -> list[list[int]]:
    return Crowd(moving, "undisturbed", FEW).finish()


def drain(node: Node) -> None:
    deadline_ms = int((time.time() + DEADLINE_S) * 1000)
    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, reason = gcs.drain_node(node.node_id, PREEMPTION, "it is to go", deadline_ms)
    assert accepted, reason


def members(view: dict[str, Any], *kinds: str) -> list[dict[str, Any]]:
    return [member for kind in kinds for member in view[kind] if member["state"] != "dead"]


def view_of(service: Service) -> dict[str, Any]:
    """As the controller has it, which may move to another node, too."""
    deadline_s = time.monotonic() + WHOLE_S
    while True:
        try:
            return service.view()
        except RayError:
            assert time.monotonic() < deadline_s, f"no controller within {WHOLE_S} s"
            time.sleep(POLL_S)


def serving_shards(view: dict[str, Any]) -> list[dict[str, Any]]:
    return [shard for shard in view["shards"] if shard["state"] == "ready" and shard["slots"]]


def num_resubmissions(service: Service) -> float:
    lines = send(service, "/metrics", method="GET").body.decode().splitlines()
    [line] = [line for line in lines if line.startswith("arriero:resubmissions_total")]
    return float(line.split()[-1])


def run_crowds_until(service: Service, is_so: Callable[[], bool], undisturbed: list[list[int]]) -> int:
    """One crowd after the other, the first of them warm before is_so is asked. How many there were."""
    num_crowds, crowd, deadline_s = 1, Crowd(service, "crowd 1", FEW), time.monotonic() + WHOLE_S
    crowd.wait_until_warm()
    while not is_so():
        assert time.monotonic() < deadline_s, f"not so within {WHOLE_S} s: {view_of(service)}"
        if crowd.is_over:
            assert crowd.finish() == undisturbed
            num_crowds += 1
            crowd = Crowd(service, f"crowd {num_crowds}", FEW)
        time.sleep(POLL_S)
    assert crowd.finish() == undisturbed
    return num_crowds


def test_a_drained_node_empties_itself_and_no_stream_notices(
    moving: Service, first_node: Node, add_node: AddNode, undisturbed: list[list[int]], tell: Tell
) -> None:
    before = members(view_of(moving), "routers", "shards")
    assert {member["node"] for member in before} == {first_node.node_id}
    second_node, shown = add_node(), set()
    drained_s: list[float] = []

    def is_empty() -> bool:
        if not drained_s:
            drain(first_node)
            drained_s.append(time.monotonic())
        view = view_of(moving)
        there = [each for each in members(view, "routers", "shards") if each["node"] == first_node.node_id]
        shown.update((each["id"].split("-")[0], each["state"]) for each in there)
        moved = [*serving_shards(view), *(each for each in view["routers"] if each["state"] == "ready")]
        return not there and [each["node"] for each in moved] == 4 * [second_node.node_id]

    num_crowds = run_crowds_until(moving, is_empty, undisturbed)
    tell(f"empty after {time.monotonic() - drained_s[0]:.1f} s and {num_crowds} crowds")
    assert {("router", "draining"), ("shard", "draining")} <= shown
    assert view_of(moving)["controller"]["node"] != first_node.node_id
    assert num_resubmissions(moving) == 0
    first_node.kill_all_processes(check_alive=False, allow_graceful=False)
    # Proxies of one machine share a port, so a client may have to come back.
    assert [list(answer.token_ids) for answer in ask_all(moving, FEW)] == undisturbed


def test_a_shard_that_is_told_to_end_is_replaced_first(moving: Service, undisturbed: list[list[int]]) -> None:
    leaving = serving_shards(view_of(moving))[0]
    asked: list[int] = []

    def is_replaced() -> bool:
        if not asked:
            os.kill(leaving["pid"], signal.SIGTERM)
            asked.append(leaving["pid"])
        view = view_of(moving)
        ids = [shard["id"] for shard in members(view, "shards")]
        return leaving["id"] not in ids and len(serving_shards(view)) == len(ids) == 2

    run_crowds_until(moving, is_replaced, undisturbed)
    wait_until(lambda: not os.path.exists(f"/proc/{leaving['pid']}"), "its process has ended")
    assert num_resubmissions(moving) == 0
