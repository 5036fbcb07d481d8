"""What an operator sees of a service: its metrics, its log, its open requests."""

from __future__ import annotations

import os
import re
import signal
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import ray
import service_log
from conftest import RunApp, Service, wait_until
from prometheus_client.parser import text_string_to_metric_families

from cluster.client_types import ArrieroError, Piece, Sampling
from cluster.commands.status import requests_to_table
from cluster.control.shard_pool import NAMESPACE
from cluster.metrics.definitions import METRICS, Kind
from cluster.v1 import admin_pb2, admin_pb2_grpc

pytestmark = pytest.mark.cluster

# Well below the 1.3 s of silence after which a stopped engine's requests go to another router.
SLOW_S = 0.4
# An engine that is silent for ten seconds is replaced: a test that stops one must not take that long.
STOPPED_S = 8.0

Series = tuple[str, tuple[tuple[str, str], ...]]


@pytest.fixture(scope="module")
def service(run_app: RunApp) -> Iterator[Service]:
    options: dict[str, Any] = {
        "log_format": "json",
        "log_level": "debug",
        "access_log": "on",
        "slow_request_s": SLOW_S,
        "served_model_name": "llama",
    }
    with run_app("watched", routers=2, shards=2, **options) as running:
        yield running


def scrape(service: Service) -> dict[Series, float]:
    """Every series by its name and labels. Raises HTTPError."""
    url = f"http://{service.cluster.http_address}/{service.app_name}/metrics"
    with urllib.request.urlopen(url, timeout=30) as response:
        text = response.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}
    assert len(found) == len(samples), "no series comes twice"
    return found


def total(series: dict[Series, float], name: str, **labels: str) -> float:
    """The sum over the series of that name that have these labels."""
    return sum(value for (each, own), value in series.items() if each == name and labels.items() <= dict(own).items())


def ask(service: Service, request_id: str, num_tokens: int, *, n: int = 1) -> list[Piece]:
    sampling = Sampling(max_tokens=num_tokens, ignore_eos=True)
    with service.client() as client:
        return list(client.generate([1, 5, 7, 9], sampling=sampling, n=n, request_id=request_id))


def test_counters_equal_the_traffic(service: Service) -> None:
    before = scrape(service)
    work = [(f"count-{index}", 3 + index, 1 + index % 2) for index in range(8)]
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda each: ask(service, each[0], each[1], n=each[2]), work))
    with service.client() as client, pytest.raises(ArrieroError, match="INVALID_ARGUMENT"):
        list(client.generate([1, 99999]))
    num_tokens = sum(num_tokens * n for _, num_tokens, n in work)
    num_choices = sum(n for _, _, n in work)
    assert sum(len(piece.token_ids) for pieces in answers for piece in pieces) == num_tokens
    expected = {
        "vllm:prompt_tokens_total": 4 * len(work),
        "vllm:generation_tokens_total": num_tokens,
        "vllm:request_success_total": num_choices,
        "vllm:time_to_first_token_seconds_count": len(work),
        "vllm:inter_token_latency_seconds_count": num_tokens - num_choices,
        "vllm:e2e_request_latency_seconds_count": len(work),
        "vllm:request_queue_time_seconds_count": num_choices,
        "vllm:request_prompt_tokens_count": len(work),
        "vllm:request_prompt_tokens_sum": 4 * len(work),
        "vllm:request_generation_tokens_count": num_choices,
        "vllm:request_generation_tokens_sum": num_tokens,
        "arriero:request_errors_total": 1,
    }

    def counted() -> dict[str, float]:
        after = scrape(service)
        return {name: total(after, name) - total(before, name) for name in expected}

    wait_until(lambda: counted() == expected, "the counters of gateways", timeout_s=10)
    after = scrape(service)
    reasons = {
        reason: total(after, "vllm:request_success_total", finished_reason=reason)
        - total(before, "vllm:request_success_total", finished_reason=reason)
        for reason in ("stop", "length", "abort")
    }
    assert reasons == {"stop": 0, "length": num_choices, "abort": 0}
    # What engines looked up is as old as their last heartbeat: of each choice its prompt.
    wait_until(
        lambda: (
            total(scrape(service), "vllm:prefix_cache_queries_total") - total(before, "vllm:prefix_cache_queries_total")
            == 4 * num_choices
        ),
        "the counters of routers",
        timeout_s=10,
    )


def test_every_metric_and_every_member_is_there(service: Service) -> None:
    ask(service, "warm-up", 4)
    wait_until(lambda: total(scrape(service), "arriero:expert_rows_total") > 0, "reports of shards")
    series = scrape(service)
    # Series that begin with the first thing that goes wrong.
    unborn = {"arriero:refused_lanes_total"}
    names = {f"{metric.name}_total" if metric.kind is Kind.COUNTER else metric.name for metric in METRICS}
    found = {re.sub(r"_(bucket|sum|count)$", "", name) for name, _ in series}
    assert found - {"arriero:request_errors_total"} == names - unborn - {"arriero:request_errors_total"}
    view = service.view()
    members = {member["id"] for kind in ("gateways", "routers", "shards") for member in view[kind]}
    memory = {dict(labels)["member"]: value for (name, labels), value in series.items() if "resident_memory" in name}
    assert memory.keys() == members | {view["controller"]["id"]}
    assert all(value > 10e6 for value in memory.values())
    assert total(series, "arriero:members", kind="router", state="ready") == 2
    assert total(series, "arriero:epoch") == 1
    assert {dict(labels)["model_name"] for _, labels in series} == {"llama"}


def test_counters_do_not_go_back_when_a_router_is_killed_or_the_controller(service: Service) -> None:
    ask(service, "before-the-kill", 8)
    counters = ("vllm:generation_tokens_total", "vllm:prefix_cache_queries_total", "arriero:engine_steps_total")
    wait_until(lambda: all(total(scrape(service), name) > 0 for name in counters), "reports")
    victim = service.view()["routers"][0]
    seen = [scrape(service)]

    def look() -> bool:
        try:
            seen.append(scrape(service))
        except urllib.error.HTTPError:
            return False
        return total(seen[-1], "arriero:members", kind="router", state="ready") == 2

    os.kill(victim["pid"], signal.SIGKILL)
    wait_until(lambda: not look() and total(seen[-1], "arriero:members", kind="router", state="dead") == 1, "its death")
    assert not any(dict(labels).get("member") == victim["id"] for _, labels in seen[-1]), "its gauges are gone"
    wait_until(look, "another router")
    os.kill(service.view()["controller"]["pid"], signal.SIGKILL)
    num_seen = len(seen)
    wait_until(lambda: look() and len(seen) > num_seen + 1, "the controller is back and knows everybody")
    for name in counters:
        values = [total(series, name) for series in seen]
        assert values == sorted(values), name


def test_a_request_is_found_by_its_id_in_the_log_of_every_process(service: Service) -> None:
    ask(service, "find/me", 5)
    gateway, router = (rf"{kind}-\w+" for kind in ("gateway", "router"))
    wanted = (gateway, router, f"{router}-engine")

    def processes() -> Counter[str]:
        names = [line["process"] for line in service_log.json_lines(request_id="find/me")]
        return Counter(kind for name in names for kind in wanted if re.fullmatch(kind, name))

    wait_until(lambda: set(processes()) == set(wanted), "lines of all three processes", timeout_s=10)
    [line] = service_log.json_lines(request_id="find/me", logger="arriero.access")
    assert (line["protocol"], line["method"], line["status"], line["finish_reason"]) == (
        "grpc",
        "Generate",
        "OK",
        "length",
    )
    assert (line["prompt_tokens"], line["output_tokens"]) == (4, 5)
    assert 0 < line["first_token_s"] <= line["total_s"]


def test_a_request_that_stands_still_is_logged_and_listed_and_goes_on(service: Service) -> None:
    sampling = Sampling(max_tokens=400, ignore_eos=True)
    with service.client() as client:
        stream = client.generate([1, 2, 3], sampling=sampling, request_id="stuck")
        num_tokens = len(next(stream).token_ids)
        wait_until(lambda: _listed(service, "stuck"), "it is listed", timeout_s=STOPPED_S)
        [request] = _listed(service, "stuck")
        [engine_pid] = [each["pid"] for each in service.view()["routers"] if each["id"] == request.router_id]
        os.kill(engine_pid, signal.SIGSTOP)
        try:
            wait_until(lambda: _slow_lines("stuck"), "it is named", timeout_s=STOPPED_S)
            [request] = _listed(service, "stuck")
        finally:
            os.kill(engine_pid, signal.SIGCONT)
        num_tokens += sum(len(piece.token_ids) for piece in stream)
    line = _slow_lines("stuck")[0]
    assert (line["level"], line["choice"], line["phase"], line["attempt"]) == ("WARNING", 0, "decoding", 0)
    assert (request.phase, request.num_prompt_tokens) == ("decoding", 3)
    assert request.idle_s >= SLOW_S
    assert 0 < request.num_completion_tokens < 400
    assert num_tokens == 400
    assert re.search(r"^stuck +0 +gateway-\w+ +router-\w+ +decoding ", _table(request), re.MULTILINE)
    wait_until(lambda: not _listed(service, "stuck"), "it has ended", timeout_s=10)


def test_open_requests_are_only_for_those_who_know_the_token(service: Service) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        _list(service, service.metadata)
    assert failure.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_without_an_answer_of_the_controller_there_are_no_metrics(service: Service) -> None:
    controller = service.view()["controller"]["pid"]
    os.kill(controller, signal.SIGSTOP)
    try:
        with pytest.raises(urllib.error.HTTPError) as failure:
            scrape(service)
    finally:
        os.kill(controller, signal.SIGCONT)
    assert failure.value.code == 503
    assert failure.value.read() == b"the controller does not answer: try again\n"
    assert ray.get_actor(f"{service.app_name}:controller", namespace=NAMESPACE)


def _slow_lines(request_id: str) -> list[dict[str, Any]]:
    lines = service_log.json_lines(request_id=request_id, logger="arriero.gateway")
    return [line for line in lines if line["message"].startswith("no progress for")]


def _listed(service: Service, request_id: str) -> list[admin_pb2.OpenRequest]:
    return [each for each in _list(service, service.admin_metadata).requests if each.request_id == request_id]


def _list(service: Service, metadata: tuple[tuple[str, str], ...]) -> admin_pb2.ListRequestsResponse:
    with grpc.insecure_channel(service.cluster.grpc_address) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        return stub.ListRequests(admin_pb2.ListRequestsRequest(), metadata=metadata, timeout=10)


def _table(request: admin_pb2.OpenRequest) -> str:
    return requests_to_table("here", admin_pb2.ListRequestsResponse(num_open=1, requests=[request]))
