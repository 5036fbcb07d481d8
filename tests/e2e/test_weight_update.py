"""Other weights take the place of those that are served, under open streams, each of which is answered by one
version."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from answers import Ask
from conftest import RunApp, Service, Tell, wait_until
from crowd import ASKS, WHOLE_S
from ray.exceptions import RayError

from cluster.checkpoints.presets import create_checkpoint
from cluster.client import ArrieroClient
from cluster.client_types import RetryPolicy
from cluster.control.shard_pool import NAMESPACE
from cluster.v1 import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc

pytestmark = pytest.mark.cluster

NUM_REQUESTS = 200
NUM_THREADS = 10
FEW = [replace(ask, sampling=replace(ask.sampling, max_tokens=25)) for ask in ASKS]
LONG = [replace(ask, sampling=replace(ask.sampling, max_tokens=150)) for ask in ASKS[:2]]


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_checkpoint("tiny-maverick", tmp_path_factory.mktemp("other") / "tiny-maverick", seed=1)


@pytest.fixture(scope="module")
def service(run_app: RunApp) -> Iterator[Service]:
    with run_app("updated", routers=2, shards=2, stream_interval_ms=0, num_kv_blocks=1024) as running:
        yield running


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    ask: Ask
    token_ids: list[int]
    weights_version: int | None
    began_s: float
    ended_s: float


class Asker:
    """Asks over and over in threads of its own; no client tries again by itself."""

    def __init__(self, service: Service) -> None:
        self._client = ArrieroClient(
            service.cluster.grpc_address, application=service.app_name, retry=RetryPolicy(max_tries=1)
        )
        self._threads = ThreadPoolExecutor(NUM_THREADS + len(LONG))
        self._has_enough = threading.Event()
        self.answers: list[Answer] = []
        self._reads: list[Future[None]] = []

    def once(self, ask: Ask) -> Answer:
        stream = self._client.generate(ask.prompt_ids, sampling=ask.sampling, seed=ask.seed, timeout_s=200)
        began_s = time.monotonic()
        tokens = [token_id for piece in stream for token_id in piece.token_ids]
        return Answer(
            ask=ask,
            token_ids=tokens,
            weights_version=stream.weights_version,
            began_s=began_s,
            ended_s=time.monotonic(),
        )

    def tokens_of(self, asks: list[Ask]) -> dict[int, list[int]]:
        """By the asks' seeds."""
        return {
            ask.seed: answer.token_ids for ask, answer in zip(asks, self._threads.map(self.once, asks), strict=True)
        }

    def begin(self, ask: Ask, *, again: bool) -> None:
        def read() -> None:
            self.answers.append(self.once(ask))
            while again and not self._has_enough.is_set():
                self.answers.append(self.once(ask))

        self._reads.append(self._threads.submit(read))

    def finish(self) -> list[Answer]:
        """Raises what a stream has raised."""
        self._has_enough.set()
        for read in self._reads:
            read.result(WHOLE_S)
        return self.answers

    def close(self) -> None:
        self._has_enough.set()
        self._threads.shutdown()
        self._client.close()


@pytest.fixture
def asker(service: Service) -> Iterator[Asker]:
    made = Asker(service)
    yield made
    made.close()


def view_of(service: Service) -> dict[str, Any]:
    """Also of a controller that is on its way back."""
    found: list[dict[str, Any]] = []

    def answers() -> bool:
        try:
            found.append(service.view())
        except RayError:
            return False
        return True

    wait_until(answers, "the controller answers", timeout_s=WHOLE_S)
    return found[-1]


def call(service: Service, method: Callable[[admin_pb2_grpc.AdminServiceStub], object], request: object) -> object:
    with grpc.insecure_channel(service.cluster.grpc_address) as channel:
        stub = method(admin_pb2_grpc.AdminServiceStub(channel))
        return stub(request, metadata=service.admin_metadata, timeout=60)  # type: ignore[operator]


def begin_update(service: Service, model: Path) -> str:
    request = admin_pb2.UpdateWeightsRequest(model=str(model))
    return call(service, lambda admin: admin.UpdateWeights, request).update_id  # type: ignore[attr-defined]


def wait_for_state(service: Service, *states: str) -> None:
    wait_until(lambda: view_of(service)["update"]["state"] in states, f"one of {states}", timeout_s=WHOLE_S)


def versions_in_shards(service: Service) -> list[dict[int, int]]:
    """Of each shard, how many slots it holds of each version."""
    shards = [shard["id"] for shard in view_of(service)["shards"] if shard["state"] == "ready"]
    actors = [ray.get_actor(f"{service.app_name}:{shard}", namespace=NAMESPACE) for shard in shards]
    return [dict(stats["num_slots_by_version"]) for stats in ray.get([actor.stats.remote() for actor in actors])]


def test_an_update_in_the_middle_of_200_requests_loses_none_and_each_is_answered_by_one_version(
    service: Service, asker: Asker, other_weights: Path, tell: Tell
) -> None:
    old, old_long = asker.tokens_of(FEW), asker.tokens_of(LONG)
    for ask in FEW:
        asker.begin(ask, again=True)
    wait_until(lambda: len(asker.answers) >= 30, "answers of the old version", timeout_s=WHOLE_S)
    update_id = begin_update(service, other_weights)
    wait_for_state(service, "starting_routers")
    for ask in LONG:
        asker.begin(ask, again=False)
    wait_for_state(service, "done")
    wait_until(lambda: len(asker.answers) >= NUM_REQUESTS, f"{NUM_REQUESTS} answers", timeout_s=WHOLE_S)
    answers = asker.finish()
    new, new_long = asker.tokens_of(FEW), asker.tokens_of(LONG)
    assert all(old_long[seed] != new_long[seed] for seed in old_long), "the two versions answer alike"

    for answer in answers:
        by_version = {1: old_long if answer.ask in LONG else old, 2: new_long if answer.ask in LONG else new}
        assert answer.weights_version in by_version
        assert answer.token_ids == by_version[answer.weights_version][answer.ask.seed]
    by_old = [answer for answer in answers if answer.weights_version == 1]
    by_new = [answer for answer in answers if answer.weights_version == 2]
    first_new_s = min(answer.began_s for answer in by_new)
    num_across = sum(answer.ended_s > first_new_s for answer in by_old)
    assert num_across > 0, "no stream of the old version was open when the new one answered"
    view = view_of(service)
    assert (view["update"]["update_id"], view["weights_version"]) == (update_id, 2)
    wait_until(lambda: all(set(held) == {2} for held in versions_in_shards(service)), "the old weights are gone")
    assert sum(sum(held.values()) for held in versions_in_shards(service)) == 4 * 8
    wait_until(lambda: len(view_of(service)["routers"]) == 2, "the old routers are gone")
    tell(f"{len(by_old)} answers of the old version, {len(by_new)} of the new; {num_across} went on across the switch")


def kill_a_shard(service: Service) -> None:
    victim = next(shard for shard in view_of(service)["shards"] if shard["state"] == "ready")
    os.kill(victim["pid"], signal.SIGKILL)
    wait_until(lambda: state_of(service, victim["id"]) in (None, "dead"), "the shard is gone")


def state_of(service: Service, shard_id: str) -> str | None:
    return next((shard["state"] for shard in view_of(service)["shards"] if shard["id"] == shard_id), None)


def kill_a_router(service: Service) -> None:
    """The replica goes with its engine, and with the other version's."""
    ready: list[dict[str, Any]] = []

    def is_known() -> bool:
        """A controller that has just come back hears of routers by and by."""
        ready.extend(router for router in view_of(service)["routers"] if router["state"] == "ready")
        return bool(ready)

    wait_until(is_known, "a router is ready")
    os.kill(ready[0]["pid"], signal.SIGKILL)


def kill_the_controller(service: Service) -> None:
    os.kill(view_of(service)["controller"]["pid"], signal.SIGKILL)


def test_a_shard_a_router_and_the_controller_die_in_an_update_and_no_stream_notices(
    service: Service, asker: Asker, tiny_maverick: Path
) -> None:
    """The weights of the start come back, as another version; no expert has a second copy."""
    before = view_of(service)["weights_version"]
    old = asker.tokens_of(LONG)
    for ask in LONG:
        asker.begin(ask, again=True)
    wait_until(lambda: len(asker.answers) >= 2, "answers of the old version", timeout_s=WHOLE_S)
    begin_update(service, tiny_maverick)
    for state, strike in (("starting_routers", kill_a_shard), ("draining", kill_the_controller)):
        wait_for_state(service, state, "done")
        strike(service)
    kill_a_router(service)
    wait_for_state(service, "done")
    num_before = len(asker.answers)
    wait_until(
        lambda: len(asker.answers) >= num_before + 2 * len(LONG), "answers of the new version", timeout_s=WHOLE_S
    )
    answers = asker.finish()
    new = asker.tokens_of(LONG)
    assert {answer.weights_version for answer in answers} == {before, before + 1}
    for answer in answers:
        assert answer.token_ids == (old if answer.weights_version == before else new)[answer.ask.seed]
    gone = {before + 1}
    wait_until(lambda: all(set(held) == gone for held in versions_in_shards(service)), "the old weights are gone")


def test_what_cannot_be_taken_up_is_refused_and_named(service: Service, tiny_maverick: Path, tmp_path: Path) -> None:
    served = view_of(service)["model"]
    other = create_checkpoint("tiny-scout", tmp_path / "scout")
    for model, code, told in (
        (Path(served), grpc.StatusCode.FAILED_PRECONDITION, "has the weights of"),
        (other, grpc.StatusCode.INVALID_ARGUMENT, "num_local_experts is 4, the service has 8"),
        (tmp_path / "nothing", grpc.StatusCode.INVALID_ARGUMENT, "no such folder"),
    ):
        with pytest.raises(grpc.RpcError) as failure:
            begin_update(service, model)
        assert failure.value.code() is code
        assert told in failure.value.details()
    with grpc.insecure_channel(service.cluster.grpc_address) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        with pytest.raises(grpc.RpcError) as failure:
            stub.UpdateWeights(admin_pb2.UpdateWeightsRequest(), metadata=service.metadata, timeout=60)
    assert failure.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_stream_of_weights_that_are_gone_is_not_resumed_by_others(service: Service) -> None:
    request = generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=ASKS[0].prompt_ids), request_id="r", seed=1, weights_version=0
    )
    request.resume_token_ids.add(choice_index=0, token_ids=[5, 6])
    with grpc.insecure_channel(service.cluster.grpc_address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as failure:
            list(stub.Generate(request, metadata=service.metadata, timeout=60))
    assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "weights_version: 0 is not served any more" in failure.value.details()
