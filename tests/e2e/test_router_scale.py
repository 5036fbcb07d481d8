"""Routers come and go with the load, under open streams, which may not notice."""

from __future__ import annotations

import time
from dataclasses import replace

import grpc
import pytest
from conftest import RunApp, Service, Tell, wait_until
from crowd import ASKS, WHOLE_S, Crowd
from http_calls import send
from ray import serve

from cluster.v1 import admin_pb2, admin_pb2_grpc

pytestmark = pytest.mark.cluster

# Of one router: ten streams are too many for it, three are few even with a fifth to spare.
SEATS = 4
FEW = [replace(ask, sampling=replace(ask.sampling, max_tokens=1000)) for ask in ASKS[:3]]


def ready_routers(service: Service) -> set[str]:
    return {router["id"] for router in service.view()["routers"] if router["state"] == "ready"}


def num_replicas(service: Service, state: str) -> int:
    routers = serve.status().applications[service.app_name].deployments["Router"]
    return routers.replica_states.get(state, 0)


def open_choices(service: Service) -> list[admin_pb2.OpenRequest]:
    with grpc.insecure_channel(service.cluster.grpc_address) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        request = admin_pb2.ListRequestsRequest()
        return list(stub.ListRequests(request, metadata=service.admin_metadata, timeout=10).requests)


def num_resubmissions(service: Service) -> float:
    lines = send(service, "/metrics", method="GET").body.decode().splitlines()
    [line] = [line for line in lines if line.startswith("arriero:resubmissions_total")]
    return float(line.split()[-1])


def test_routers_come_with_the_load_and_go_without_it_and_no_stream_notices(run_app: RunApp, tell: Tell) -> None:
    options = {
        "max_num_seqs": SEATS,
        "router_seat_target": 1.0,
        "router_up_delay_s": 0.5,
        "router_down_delay_s": 2.0,
        "num_kv_blocks": 1024,
        "drain_timeout_s": 60.0,
        "stream_interval_ms": 0,
    }
    with run_app("breathing", routers=1, max_routers=3, shards=2, **options) as service:
        [first] = ready_routers(service)
        undisturbed = [
            tokens
            for index in range(0, len(ASKS), SEATS)
            for tokens in Crowd(service, "undisturbed", ASKS[index : index + SEATS]).finish()
        ]
        undisturbed_few = Crowd(service, "undisturbed", FEW).finish()
        assert ready_routers(service) == {first}, "four streams at a time are not too much for one router"

        # One crowd begins before the other has ended: the load never thins out.
        num_crowds, crowd, deadline_s = 1, Crowd(service, "crowd 1"), time.monotonic() + WHOLE_S
        while num_replicas(service, "RUNNING") < 3 or len(ready_routers(service)) < 3:
            assert time.monotonic() < deadline_s, f"no third router within {WHOLE_S} s of load"
            num_crowds += 1
            following = Crowd(service, f"crowd {num_crowds}")
            assert crowd.finish() == undisturbed
            crowd = following
        assert first in ready_routers(service)

        few = [Crowd(service, "few", FEW)]
        assert crowd.finish() == undisturbed
        wait_until(lambda: len(open_choices(service)) == len(FEW), "only the few are left")
        if len({choice.router_id for choice in open_choices(service)}) == 1:
            # Chance had it that all came to one router; these will be drawn to the others.
            few.append(Crowd(service, "few more", FEW))
        wait_until(lambda: num_replicas(service, "STOPPING"), "Serve stops routers")
        taken = {choice.router_id for choice in open_choices(service)}
        for each in few:
            each.assert_all_open()
        assert [each.finish() for each in few] == [undisturbed_few] * len(few)
        wait_until(lambda: len(ready_routers(service)) == 1, "one router is left")
        assert taken - ready_routers(service), "no stream was with a router that left"
        assert num_resubmissions(service) == 0
        tell(f"three routers after {num_crowds} crowds; streams at {len(taken)} of them when two were told to go")
