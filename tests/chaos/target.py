"""The service that is to suffer, as a client and an operator on its machine reach it."""

from __future__ import annotations

import time
import urllib.request
from typing import Any

import grpc
from conditions import wait_until
from prometheus_client.parser import text_string_to_metric_families

from chaos.view import View, view_of
from cluster.control.membership import MemberKind
from cluster.v1 import admin_pb2, admin_pb2_grpc

CALL_S = 5.0
# A controller that starts again imports much, on a machine that may be busy; so does a shard.
WHOLE_S = 180.0
IDLE_S = 60.0
LOOK_EVERY_S = 0.2
# What an engine reports may be as old.
MAX_AGE_S = 1.5
IDLE_GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
# A call that a service which lacks its controller, or a gateway, may not answer.
PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL)


class Target:
    """Methods may be called from one thread at a time."""

    def __init__(self, *, grpc_address: str, http_url: str, application: str, admin_token: str) -> None:
        self.grpc_address = grpc_address
        self.application = application
        self._http_url = http_url
        self._metadata = (("application", application), ("authorization", f"Bearer {admin_token}"))
        self._channel = grpc.insecure_channel(grpc_address)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def view(self) -> View | None:
        """None while nobody answers."""
        response = self._call(self._admin.GetView, admin_pb2.GetViewRequest())
        return None if response is None else view_of(response)

    def whole_view(self, like: View | None = None) -> View:
        """Waits until it has the shape of this one. Raises AssertionError with what is there instead."""
        seen: list[View | None] = [None]

        def is_whole() -> bool:
            seen[0] = self.view()
            return seen[0] is not None and (like is None or seen[0].shape == like.shape)

        try:
            wait_until(is_whole, "the view is whole", WHOLE_S, every_s=LOOK_EVERY_S)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {seen[0]}") from None
        assert seen[0] is not None
        return seen[0]

    def scale_shards(self, num_shards: int) -> set[str]:
        """The ids of those that will be there. Raises grpc.RpcError."""
        request = admin_pb2.ScaleShardsRequest(num_shards=num_shards)
        return set(self._admin.ScaleShards(request, timeout=CALL_S, metadata=self._metadata).shard_ids)

    def requests_of(self, router_id: str) -> set[str]:
        """The ids of requests that a router works on, as of half a second ago."""
        response = self._call(self._admin.ListRequests, admin_pb2.ListRequestsRequest(max_requests=1000))
        found = [] if response is None else response.requests
        return {each.request_id for each in found if each.router_id == router_id}

    def wait_until_idle(self) -> None:
        """Until no router has a request, and all KV blocks can be handed out: said for longer than it may be old."""
        seen: dict[str, float] = {}
        idle_since: list[float] = []

        def is_idle_for_long() -> bool:
            seen.clear()
            seen.update(self._idle_gauges())
            if not seen or any(seen.values()):
                idle_since.clear()
                return False
            idle_since.append(time.monotonic())
            return idle_since[-1] - idle_since[0] > MAX_AGE_S

        try:
            wait_until(is_idle_for_long, "all engines idle, all blocks free", IDLE_S, every_s=LOOK_EVERY_S)
        except AssertionError as error:
            raise AssertionError(f"{error}; they say {seen}") from None

    def _idle_gauges(self) -> dict[str, float]:
        """Of every router that the view shows, which must have all of them; empty when one has not yet."""
        view = self.view()
        routers = {each.member_id for each in view.ready(MemberKind.ROUTER)} if view else set()
        try:
            with urllib.request.urlopen(f"{self._http_url}/metrics", timeout=CALL_S) as answer:
                families = list(text_string_to_metric_families(answer.read().decode()))
        except OSError:  # a gateway that has just come may not have found its controller
            return {}
        samples = [sample for family in families for sample in family.samples if sample.name in IDLE_GAUGES]
        found = {
            f"{sample.name} {member}": sample.value
            for sample in samples
            if (member := sample.labels.get("member")) in routers
        }
        return found if len(found) == len(routers) * len(IDLE_GAUGES) else {}

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=CALL_S, metadata=self._metadata)
        except grpc.RpcError as error:
            if error.code() not in PASSING:
                raise
            return None
