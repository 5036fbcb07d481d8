"""Whatever comes in by gRPC: a clear status, nothing of the inside in it, and a service that goes on as before."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import openai
import pytest
from answers import Answer, Ask, ask
from conftest import RunApp, Service, wait_until
from engine_watch import EngineWatch, total
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from http_calls import MODEL, openai_client
from refusals import BAD_SAMPLING, Refusal, refusals, text_request
from tiny_models import prompt

from cluster.client import ArrieroClient
from cluster.client_types import ArrieroError, RetryPolicy, Sampling
from cluster.v1 import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc

TIMEOUT_S = 60.0
GOOD = Ask(prompt_ids=prompt(31, seed=31), sampling=Sampling(max_tokens=8, ignore_eos=True, logprobs=5), seed=31)
# Runs for many seconds unless something ends it.
ENDLESS = Sampling(max_tokens=4000, ignore_eos=True)
# Signs of a stack trace, of our files, or of Python's way of printing objects.
INSIDE = re.compile(r'Traceback|File "|line \d+, in|\.py\b|/work|site-packages|<.* at 0x|ray::')
REFUSALS = list(refusals())


@pytest.fixture(scope="module")
def channel(service: Service) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(service.cluster.grpc_address) as channel:
        yield channel


@pytest.fixture(scope="module")
def good_answer(service: Service) -> Answer:
    return ask(service, GOOD)


@pytest.fixture(scope="module")
def pids(service: Service) -> set[int]:
    return pids_of(service)


@pytest.fixture(autouse=True)
def unharmed(service: Service, good_answer: Answer, pids: set[int]) -> Iterator[None]:
    """After every test: the same processes give the same answer to a good request."""
    yield
    assert ask(service, GOOD) == good_answer
    assert pids_of(service) == pids


def pids_of(service: Service) -> set[int]:
    view = service.view()
    return {member["pid"] for member in (view["controller"], *view["gateways"], *view["routers"], *view["shards"])}


def refused(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    """Code and details of a call that must fail, clear of anything of the inside."""
    with pytest.raises(grpc.RpcError) as failure:
        call()
    code, details = failure.value.code(), failure.value.details()
    assert details
    assert len(details) < 500
    assert not INSIDE.search(details), details
    return code, details


def generate(channel: grpc.Channel, service: Service, request: generation_pb2.GenerateRequest) -> list[Any]:
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    return list(stub.Generate(request, metadata=service.metadata, timeout=TIMEOUT_S))


def call_raw(channel: grpc.Channel, service: Service, method: str, data: bytes) -> list[bytes]:
    """Bytes as they are, and as bytes what comes back."""
    call = channel.unary_stream(method, request_serializer=None, response_deserializer=None)
    return list(call(data, metadata=service.admin_metadata, timeout=TIMEOUT_S))


@pytest.mark.parametrize("refusal", REFUSALS, ids=[refusal.name for refusal in REFUSALS])
def test_a_bad_request_is_refused_by_field_and_value(service: Service, channel: grpc.Channel, refusal: Refusal) -> None:
    code, details = refused(lambda: generate(channel, service, refusal.request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [word for word in refusal.words if word not in details] == [], details


def test_every_sampling_field_has_its_bad_values() -> None:
    fields = set(generation_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
    assert fields - set(BAD_SAMPLING) == {"ignore_eos", "include_stop_str_in_output"}


def test_a_request_of_many_megabytes_is_refused_by_its_size(service: Service, channel: grpc.Channel) -> None:
    request = generation_pb2.GenerateRequest(text="x" * (17 * 2**20))
    code, details = refused(lambda: generate(channel, service, request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert str(request.ByteSize()) in details


@pytest.mark.parametrize(
    "data",
    [b"\xff" * 9, b"\x0a\x7f", text_request().SerializeToString()[:-1], b"\x30\x80", b"\x0a\x02\xff\xfe"],
    ids=["noise", "length past the end", "cut off", "cut off in a number", "invalid UTF-8"],
)
@pytest.mark.parametrize("method", ["GenerationService/Generate", "GenerationService/Tokenize"])
def test_malformed_protobuf_is_refused(service: Service, channel: grpc.Channel, method: str, data: bytes) -> None:
    code, _ = refused(lambda: call_raw(channel, service, f"/arriero.v1.{method}", data))
    # grpcio's own word, before any code of ours.
    assert code is grpc.StatusCode.UNKNOWN


@pytest.mark.parametrize(
    "method",
    [
        "/arriero.v1.GenerationService/Train",
        "/arriero.v1.AdminService/Generate",
        "/arriero.v2.GenerationService/Generate",
    ],
)
def test_unknown_methods_are_unimplemented(service: Service, channel: grpc.Channel, method: str) -> None:
    code, _ = refused(lambda: call_raw(channel, service, method, b""))
    assert code is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("form", ["", "Bearer ", "Bearer wrong", "{token}", "Bearer {token}x", "Basic {token}", None])
def test_a_wrong_or_missing_admin_token_shows_nothing(
    service: Service, channel: grpc.Channel, form: str | None
) -> None:
    stub = admin_pb2_grpc.AdminServiceStub(channel)
    given = () if form is None else (("authorization", form.format(token=service.admin_token)),)
    metadata = (*service.metadata, *given)
    code, details = refused(lambda: stub.GetView(admin_pb2.GetViewRequest(), metadata=metadata, timeout=TIMEOUT_S))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert service.admin_token not in details


def test_the_right_admin_token_shows_the_view(service: Service, channel: grpc.Channel) -> None:
    stub = admin_pb2_grpc.AdminServiceStub(channel)
    view = stub.GetView(admin_pb2.GetViewRequest(), metadata=service.admin_metadata, timeout=TIMEOUT_S)
    assert len(view.shards) == 3


@pytest.mark.parametrize("token_ids", [[512], [2**32 - 1]])
def test_detokenize_refuses_ids_outside_the_vocabulary(
    service: Service, channel: grpc.Channel, token_ids: list[int]
) -> None:
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    request = generation_pb2.DetokenizeRequest(token_ids=token_ids)
    code, details = refused(lambda: stub.Detokenize(request, metadata=service.metadata, timeout=TIMEOUT_S))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert str(token_ids[0]) in details


def test_health_is_told_of_the_services_there_are(service: Service, channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for name in ("", "arriero.v1.GenerationService", "arriero.v1.AdminService"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=name), metadata=service.metadata, timeout=TIMEOUT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    unknown = health_pb2.HealthCheckRequest(service="arriero.v1.Nothing")
    code, details = refused(lambda: stub.Check(unknown, metadata=service.metadata, timeout=TIMEOUT_S))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "arriero.v1.Nothing" in details


def test_reflection_lists_the_services(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    [answer] = stub.ServerReflectionInfo(iter([request]), timeout=TIMEOUT_S)
    names = {entry.name for entry in answer.list_services_response.service}
    assert {"arriero.v1.GenerationService", "arriero.v1.AdminService", "grpc.health.v1.Health"} <= names


@pytest.fixture(scope="module")
def narrow(run_app: RunApp) -> Iterator[Service]:
    """One router that computes one sequence, holds another, and has a queue of two before it."""
    with run_app("narrow", routers=1, shards=0, max_num_seqs=1, max_queued_requests=2) as running:
        yield running


def test_a_deadline_reaches_the_engine(narrow: Service) -> None:
    watch = EngineWatch(narrow)
    with narrow.client() as client, ThreadPoolExecutor(2) as threads:
        # One runs, one waits in the engine, when their time is up.
        streams = [client.generate(GOOD.prompt_ids, sampling=ENDLESS, timeout_s=2.0) for _ in range(2)]
        codes = list(threads.map(code_of, streams))
    assert codes == ["DEADLINE_EXCEEDED"] * 2
    stats = watch.wait_until_idle(timeout_s=5)
    assert 0 < total(stats, "num_generated_tokens") < ENDLESS.max_tokens


def test_a_full_queue_refuses_and_then_takes_again(narrow: Service, good_answer: Answer) -> None:
    with (
        ArrieroClient(
            narrow.cluster.grpc_address, application=narrow.app_name, retry=RetryPolicy(max_tries=1)
        ) as client,
        ThreadPoolExecutor(12) as threads,
    ):
        streams = [client.generate(GOOD.prompt_ids, sampling=ENDLESS, seed=1) for _ in range(12)]
        ends = [threads.submit(code_of, stream) for stream in streams]
        # Two are at the router and two wait for it, and Serve (2.60) keeps as many more as the router hands back to it;
        # the others are refused. On a busy machine one of those that run may have come to its end.
        wait_until(lambda: sum(end.done() for end in ends) >= 4, "some are refused")
        codes = [end.result() for end in ends if end.done()]
        assert set(codes) <= {"RESOURCE_EXHAUSTED", "OK"}
        assert codes.count("RESOURCE_EXHAUSTED") >= 3
        if "OK" not in codes:
            with pytest.raises(openai.RateLimitError) as failure:
                openai_client(narrow).completions.create(model=MODEL, prompt="x")
            assert failure.value.code == "queue_full"
            assert failure.value.response.headers["retry-after"] == "1"
        for stream in streams:
            stream.close()
    EngineWatch(narrow).wait_until_idle()
    assert ask(narrow, GOOD) == good_answer


def code_of(stream: Iterator[Any]) -> str:
    """How a stream ends."""
    try:
        for _ in stream:
            pass
    except ArrieroError as error:
        return error.code
    return "OK"
