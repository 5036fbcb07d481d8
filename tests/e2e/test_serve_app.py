"""The application under Ray Serve: what clients and operators see of it from outside."""

from __future__ import annotations

import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import ray
from conftest import Cluster, RunApp, Service, actor_names, group_names, wait_until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray import serve

from cluster.app import build
from cluster.checkpoints.presets import create_checkpoint
from cluster.client import ArrieroClient
from cluster.client_types import ArrieroError, Piece, RetryPolicy, Sampling
from cluster.v1 import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc
from experts.checkpoint import Checkpoint

pytestmark = pytest.mark.cluster

PROMPT = "Sheep may safely graze."
GREEDY = Sampling(temperature=0.0, max_tokens=24, ignore_eos=True)
WARM = Sampling(temperature=1.0, max_tokens=24, ignore_eos=True)


@pytest.fixture
def channel(service: Service) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(service.cluster.grpc_address) as channel:
        yield channel


def tokens(pieces: list[Piece], choice_index: int = 0) -> list[int]:
    return [token_id for piece in pieces if piece.choice_index == choice_index for token_id in piece.token_ids]


def ask(service: Service, sampling: Sampling = GREEDY, *, seed: int = 1, n: int = 1) -> list[Piece]:
    with service.client() as client:
        return list(client.generate(PROMPT, sampling=sampling, seed=seed, n=n))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_view_shows_every_member_with_its_process_and_each_slot_once(service: Service) -> None:
    ask(service)
    wait_until(lambda: service.view()["load"], "the load of the experts")
    view = service.view()
    members = [view["controller"], *view["gateways"], *view["routers"], *view["shards"]]
    assert view["epoch"] == 1
    assert [len(view[kind]) for kind in ("gateways", "routers", "shards")] == [1, 2, 3]
    assert {member["state"] for member in members} == {"ready"}
    assert len({member["pid"] for member in members}) == len({member["id"] for member in members}) == 7
    assert all(is_alive(member["pid"]) for member in members)
    slots = sorted(tuple(slot) for shard in view["shards"] for slot in shard["slots"])
    assert slots == sorted(set(slots))
    assert {(layer, expert) for layer, expert, _ in view["load"]} <= set(slots)


def test_tokens_are_the_same_whoever_holds_the_experts(service: Service, run_app: RunApp) -> None:
    with run_app("alone", shards=0) as alone:
        assert tokens(ask(alone)) == tokens(ask(service))
        assert tokens(ask(alone, WARM, seed=5, n=2), 1) == tokens(ask(service, WARM, seed=5, n=2), 1)
        assert alone.view()["shards"] == []
        wait_until(lambda: alone.view()["load"], "the load of a router's own experts")


def test_choices_differ_and_each_comes_whole_with_its_end(service: Service) -> None:
    pieces = ask(service, WARM, n=3)
    choices = [tokens(pieces, index) for index in range(3)]
    assert [len(choice) for choice in choices] == [24, 24, 24]
    assert len({tuple(choice) for choice in choices}) == 3
    assert sorted(piece.choice_index for piece in pieces if piece.finish_reason == "length") == [0, 1, 2]
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 72
    assert all(piece.usage is None for piece in pieces[:-1])


def test_the_first_response_returns_a_seed_that_brings_the_same_tokens_again(service: Service) -> None:
    with service.client() as client:
        first = client.generate(PROMPT, sampling=WARM)
        drawn = tokens(list(first))
        again = client.generate(PROMPT, sampling=WARM, seed=first.seed)
        assert tokens(list(again)) == drawn


def test_a_resumed_stream_goes_on_where_the_client_was(service: Service, channel: grpc.Channel) -> None:
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    sampling = generation_pb2.SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True)
    request = generation_pb2.GenerateRequest(text=PROMPT, sampling=sampling, seed=9)
    whole = list(stub.Generate(request, metadata=service.metadata))
    ids = [token_id for response in whole for token_id in response.token_ids]
    text = "".join(response.text for response in whole)
    request.resume_token_ids.add(choice_index=0, token_ids=ids[:10])
    rest = list(stub.Generate(request, metadata=service.metadata))
    assert [token_id for response in rest for token_id in response.token_ids] == ids[10:]
    assert text.endswith("".join(response.text for response in rest))
    assert rest[-1].usage.completion_tokens == 24


def test_prompts_can_be_token_ids_that_tokenize_gives(service: Service) -> None:
    with service.client() as client:
        token_ids = client.tokenize(PROMPT)
        by_ids = list(client.generate(token_ids, sampling=GREEDY, seed=1))
        assert tokens(by_ids) == tokens(ask(service))
        assert client.detokenize(token_ids) == PROMPT


@pytest.mark.parametrize(
    ("request_", "details"),
    [
        (generation_pb2.GenerateRequest(), "prompt must be set"),
        (generation_pb2.GenerateRequest(text=""), "text must not be empty"),
        (generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds()), "prompt must not be empty"),
        (generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=[1, 99999])), "not 99999"),
        (generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=[5] * 10000)), "not 10000"),
        (
            generation_pb2.GenerateRequest(text="a", sampling=generation_pb2.SamplingParams(temperature=float("nan"))),
            "temperature must be",
        ),
        (
            generation_pb2.GenerateRequest(text="a", sampling=generation_pb2.SamplingParams(top_p=-0.5)),
            "top_p must be in (0, 1], not -0.5",
        ),
        (
            generation_pb2.GenerateRequest(
                chat=generation_pb2.Chat(
                    messages=[
                        generation_pb2.ChatMessage(
                            role="user",
                            content=[generation_pb2.ContentPart(image=generation_pb2.Image(url="x"))],
                        )
                    ]
                )
            ),
            "images are not supported",
        ),
        (generation_pb2.GenerateRequest(text="a", n=10**6), "n must be in"),
    ],
)
def test_bad_input_is_named_and_does_no_harm(
    service: Service, channel: grpc.Channel, request_: generation_pb2.GenerateRequest, details: str
) -> None:
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    with pytest.raises(grpc.RpcError) as failure:
        list(stub.Generate(request_, metadata=service.metadata, timeout=60))
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details in failure.value.details()
    assert "Traceback" not in failure.value.details()


def test_a_deadline_ends_a_generation(service: Service) -> None:
    with service.client() as client, pytest.raises(ArrieroError, match="DEADLINE_EXCEEDED"):
        list(client.generate(PROMPT, sampling=Sampling(max_tokens=4000, ignore_eos=True), timeout_s=1.0))


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "wrong", "Bearer "])
def test_the_view_is_only_for_those_who_know_the_token(
    service: Service, channel: grpc.Channel, authorization: str | None
) -> None:
    stub = admin_pb2_grpc.AdminServiceStub(channel)
    header = () if authorization is None else (("authorization", authorization),)
    with pytest.raises(grpc.RpcError) as failure:
        stub.GetView(admin_pb2.GetViewRequest(), metadata=(*service.metadata, *header), timeout=60)
    assert failure.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_view_answers_within_a_second(service: Service, channel: grpc.Channel) -> None:
    stub = admin_pb2_grpc.AdminServiceStub(channel)
    view = stub.GetView(admin_pb2.GetViewRequest(), metadata=service.admin_metadata, timeout=1)
    assert len(view.shards) == 3


def test_health_answers_over_grpc_and_http(service: Service, channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(), metadata=service.metadata, timeout=60)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as failure:
        stub.Check(health_pb2.HealthCheckRequest(service="x.Y"), metadata=service.metadata, timeout=60)
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
    url = f"http://{service.cluster.http_address}/{service.app_name}/health"
    with urllib.request.urlopen(url, timeout=60) as response:
        assert response.status == 200


def test_a_controller_that_is_killed_comes_back_to_the_same_shards(run_app: RunApp) -> None:
    with run_app("reborn", shards=2) as service:
        before = service.view()
        os.kill(before["controller"]["pid"], signal.SIGKILL)
        assert len(tokens(ask(service))) == 24
        wait_until(lambda: _answers(service), "the controller is back")
        after = service.view()
        assert after["controller"]["pid"] != before["controller"]["pid"]
        assert after["epoch"] == before["epoch"]
        assert [shard["pid"] for shard in after["shards"]] == [shard["pid"] for shard in before["shards"]]


def _answers(service: Service) -> bool:
    """A reborn controller has met everybody again."""
    try:
        view = service.view()
    except ray.exceptions.RayError:
        return False
    members = [*view["gateways"], *view["routers"], *view["shards"]]
    return len(members) == 4 and all(member["state"] == "ready" for member in members)


def test_a_deleted_application_leaves_no_actor_and_no_placement_group(run_app: RunApp) -> None:
    with run_app("gone", shards=2) as service:
        shards = actor_names("gone:shard")
        pids = [shard["pid"] for shard in service.view()["shards"]]
        assert len(shards) == 2
        assert group_names("gone:") == shards
    assert actor_names("gone:") == set()
    wait_until(lambda: not group_names("gone:"), "placement groups gone")
    wait_until(lambda: not any(map(is_alive, pids)), "shard processes gone")


def test_a_shard_that_cannot_load_fails_the_deployment_with_its_reason(cluster: Cluster, tmp_path: Path) -> None:
    folder = create_checkpoint("tiny-maverick", tmp_path / "broken")
    info = Checkpoint.open(folder).info("model.layers.1.feed_forward.experts.down_proj")
    with info.path.open("r+b") as file:
        file.truncate(info.offset + 8)
    application = build({"model": str(folder), "shards": 2, "app_gone_s": 0.0})
    try:
        with pytest.raises(RuntimeError):
            serve.run(application, name="broken", route_prefix="/broken")
        message = serve.status().applications["broken"].deployments["Router"].message
        assert "StartError: shard-" in message
        assert info.path.name in message
        assert not actor_names("broken:shard")
    finally:
        serve.delete("broken")
    wait_until(lambda: not actor_names("broken:") and not group_names("broken:"), "nothing is left")


def test_a_full_queue_refuses_what_comes_on_top(run_app: RunApp) -> None:
    long = Sampling(max_tokens=2000, ignore_eos=True)
    with run_app("full", shards=0, max_num_seqs=1, max_queued_requests=1) as service:
        address = service.cluster.grpc_address
        with ArrieroClient(address, application="full", retry=RetryPolicy(max_tries=1)) as client:
            streams = [client.generate(PROMPT, sampling=long) for _ in range(8)]
            codes = []
            for stream in streams:
                try:
                    next(stream)
                except ArrieroError as error:
                    codes.append(error.code)
                if codes:
                    break
            for stream in streams:
                stream.close()
        assert codes == ["RESOURCE_EXHAUSTED"]
