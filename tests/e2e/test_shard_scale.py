"""Shards are added and taken away under open streams, which may not notice."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import grpc
import pytest
import service_log
from conftest import RunApp, Service, Tell, wait_until
from crowd import WHOLE_S, Crowd

from cluster.commands.scale import PASSING, is_done
from cluster.v1 import admin_pb2, admin_pb2_grpc

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def elastic(run_app: RunApp) -> Iterator[Service]:
    with run_app("elastic", routers=1, shards=2, stream_interval_ms=0) as running:
        yield running


@pytest.fixture
def admin(elastic: Service) -> Iterator[admin_pb2_grpc.AdminServiceStub]:
    with grpc.insecure_channel(elastic.cluster.grpc_address) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


def scale(service: Service, admin: admin_pb2_grpc.AdminServiceStub, num_shards: int) -> None:
    request = admin_pb2.ScaleShardsRequest(num_shards=num_shards)
    answer = admin.ScaleShards(request, metadata=service.admin_metadata, timeout=60)
    assert len(answer.shard_ids) == num_shards

    def is_so() -> bool:
        try:
            view = admin.GetView(admin_pb2.GetViewRequest(), metadata=service.admin_metadata, timeout=60)
        except grpc.RpcError as error:
            if error.code() not in PASSING:
                raise
            return False
        return is_done(view, set(answer.shard_ids))

    wait_until(is_so, f"{num_shards} shards serve", timeout_s=WHOLE_S)


def epoch_pauses(router_id: str) -> dict[int, float]:
    """Milliseconds, as the router has logged them; an epoch that found it idle has none."""
    lines = (line for line in service_log.lines() if f"{router_id}-engine" in line)
    found = (re.search(r"epoch (\d+): pause ([\d.]+) ms", line) for line in lines)
    return {int(each[1]): float(each[2]) for each in found if each is not None}


@pytest.fixture(scope="module")
def undisturbed(elastic: Service) -> list[list[int]]:
    return Crowd(elastic, "undisturbed").finish()


def test_streams_do_not_notice_that_shards_come_and_go(
    elastic: Service, admin: admin_pb2_grpc.AdminServiceStub, undisturbed: list[list[int]], tell: Tell
) -> None:
    epoch = elastic.view()["epoch"]
    for num_shards in (3, 1, 2):
        crowd = Crowd(elastic, f"{num_shards} shards")
        crowd.wait_until_warm()
        crowd.assert_all_open()
        scale(elastic, admin, num_shards)
        assert crowd.finish() == undisturbed
    view = elastic.view()
    assert view["epoch"] >= epoch + 3
    slots = sorted(tuple(slot) for shard in view["shards"] for slot in shard["slots"])
    assert len(slots) == len(set(slots)) == 4 * 8
    pauses = epoch_pauses(view["routers"][0]["id"])
    assert pauses, "no epoch came in the middle of a stream"
    tell(f"pauses in ms by epoch: {pauses}")


def test_scaling_needs_the_token_and_a_number_that_can_be(
    elastic: Service, admin: admin_pb2_grpc.AdminServiceStub
) -> None:
    request = admin_pb2.ScaleShardsRequest(num_shards=3)
    with pytest.raises(grpc.RpcError) as failure:
        admin.ScaleShards(request, metadata=elastic.metadata, timeout=60)
    assert failure.value.code() is grpc.StatusCode.UNAUTHENTICATED
    for num_shards in (0, -1, 33, 2**31 - 1):
        request = admin_pb2.ScaleShardsRequest(num_shards=num_shards)
        with pytest.raises(grpc.RpcError) as failure:
            admin.ScaleShards(request, metadata=elastic.admin_metadata, timeout=60)
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "shards must be between 1, the copies of an expert, and 32" in failure.value.details()
        assert f"not {num_shards}" in failure.value.details()


def test_shards_come_with_the_load_and_go_without_it_and_no_stream_notices(
    run_app: RunApp, undisturbed: list[list[int]], tell: Tell
) -> None:
    options = {"shard_busy_target": 0.02, "shard_up_delay_s": 1.0, "shard_down_delay_s": 2.0, "stream_interval_ms": 0}
    with run_app("growing", routers=1, shards=1, max_shards=2, **options) as service:

        def serving() -> list[str]:
            return [shard["id"] for shard in service.view()["shards"] if shard["state"] == "ready" and shard["slots"]]

        assert len(serving()) == 1
        # One crowd begins before the other has ended: the load never thins out.
        num_crowds, crowd, deadline_s = 1, Crowd(service, "crowd 1"), time.monotonic() + WHOLE_S
        while len(serving()) < 2:
            assert time.monotonic() < deadline_s, f"no second shard within {WHOLE_S} s: {service.view()}"
            num_crowds += 1
            following = Crowd(service, f"crowd {num_crowds}")
            assert crowd.finish() == undisturbed
            crowd = following
        busy = service.view()["shard_growth"]["busy"]
        assert crowd.finish() == undisturbed
        wait_until(lambda: len(serving()) == 1, "one shard is left")
        assert service.view()["shard_growth"]["most"] == 2
        tell(f"two shards after {num_crowds} crowds, {busy} busy")
