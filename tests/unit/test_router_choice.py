"""Serve's side of the choice of a router: what it hands over of its replicas and of the call."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.request_router import ReplicaID

from cluster.front.router_choice import RouterChoice

ROUTERS = DeploymentID("Router")
REPLICAS = [SimpleNamespace(replica_id=ReplicaID(name, ROUTERS), node_id=f"node-{name}") for name in ("a", "b", "c")]


def chosen(**call: Any) -> list[list[str]]:
    choice = SimpleNamespace(replica_queue_len_cache={})
    RouterChoice.initialize_state(choice, max_gap=4, max_blocks=100)  # type: ignore[arg-type]
    pending = SimpleNamespace(kwargs=call, routing_context=SimpleNamespace(should_backoff=False))
    ranks = asyncio.run(RouterChoice.choose_replicas(choice, REPLICAS, pending))  # type: ignore[arg-type]
    assert pending.routing_context.should_backoff, "Serve would ask again without a pause"
    return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


@pytest.mark.parametrize("shun", [["b"], ["node-b"]])
def test_routers_are_shunned_by_name_and_by_node(shun: list[str]) -> None:
    assert all(set(*chosen(shun=shun)) == {"a", "c"} for _ in range(20))


def test_a_request_that_was_taken_makes_its_router_the_first_choice() -> None:
    choice = SimpleNamespace(replica_queue_len_cache={})
    RouterChoice.initialize_state(choice, max_gap=4, max_blocks=100)  # type: ignore[arg-type]
    pending = SimpleNamespace(kwargs={"prefix": b"12345678"}, routing_context=SimpleNamespace(should_backoff=False))
    RouterChoice.on_request_routed(choice, pending, REPLICAS[2].replica_id, None)  # type: ignore[arg-type]
    first, *_ = asyncio.run(RouterChoice.choose_replicas(choice, REPLICAS, pending))  # type: ignore[arg-type]
    assert [replica.replica_id.unique_id for replica in first] == ["c"]
