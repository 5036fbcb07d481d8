"""Shards are killed under open streams of a real service, without a copy of what they hold: nobody may notice more
than a pause. One service, one fault after the other, each when the view is whole again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import ray
from conftest import RunApp, Service, Tell, wait_until
from crowd import WHOLE_S, Crowd
from http_calls import MODEL, openai_client

from cluster.client import ArrieroClient
from cluster.client_types import ArrieroError, RetryPolicy, Sampling

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def frail(run_app: RunApp) -> Iterator[Service]:
    """Two routers, two shards, one copy of each expert, and requests that wait."""
    with run_app("frail", routers=2, shards=2, stream_interval_ms=0) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(frail: Service) -> list[list[int]]:
    return Crowd(frail, "undisturbed").finish()


def ready_shards(service: Service) -> dict[str, Any]:
    """By id. Those that have slots in the epoch in force."""
    return {shard["id"]: shard for shard in service.view()["shards"] if shard["state"] == "ready" and shard["slots"]}


def wait_until_whole(service: Service, *, without: str, after_epoch: int) -> None:
    def is_whole() -> bool:
        try:
            view = service.view()
        except ray.exceptions.RayError:
            return False
        shards = [shard for shard in view["shards"] if shard["state"] == "ready"]
        slots = sorted(tuple(slot) for shard in shards for slot in shard["slots"])
        return (
            view["epoch"] > after_epoch
            and len(shards) == 2
            and without not in {shard["id"] for shard in shards}
            and len(slots) == len(set(slots)) == 4 * 8
            and all(shard["slots"] for shard in shards)
            and sum(member["state"] == "ready" for member in view["routers"]) == 2
        )

    wait_until(is_whole, "the view is whole again", timeout_s=WHOLE_S)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("nth", [0, 1, 2])
def test_streams_outlive_a_killed_shard_that_had_no_copy(
    frail: Service, undisturbed: list[list[int]], tell: Tell, nth: int
) -> None:
    epoch = frail.view()["epoch"]
    # Not always the same one: its predecessor's replacement comes last in the view.
    victim = list(ready_shards(frail).values())[nth % 2]
    crowd = Crowd(frail, f"kill {nth}")
    crowd.wait_until_warm()
    crowd.assert_all_open()
    kill(victim["pid"])
    assert crowd.finish() == undisturbed
    wait_until_whole(frail, without=victim["id"], after_epoch=epoch)
    pauses = sorted(stream.longest_pause_s for stream in crowd.streams)
    tell(f"longest pause {pauses[-1]:.2f} s, median {pauses[len(pauses) // 2]:.2f} s; epoch {frail.view()['epoch']}")


def test_streams_outlive_the_controller_and_a_shard_killed_together(
    frail: Service, undisturbed: list[list[int]], tell: Tell
) -> None:
    view = frail.view()
    victim = next(iter(ready_shards(frail).values()))
    crowd = Crowd(frail, "kill both")
    crowd.wait_until_warm()
    crowd.assert_all_open()
    kill(view["controller"]["pid"])
    kill(victim["pid"])
    assert crowd.finish() == undisturbed
    wait_until_whole(frail, without=victim["id"], after_epoch=view["epoch"])
    assert frail.view()["controller"]["pid"] != view["controller"]["pid"]
    tell(f"longest pause {max(stream.longest_pause_s for stream in crowd.streams):.2f} s")


def test_all_shards_killed_at_once_only_cost_time(frail: Service, undisturbed: list[list[int]], tell: Tell) -> None:
    epoch, victims = frail.view()["epoch"], ready_shards(frail)
    assert len(victims) == 2
    crowd = Crowd(frail, "kill all")
    crowd.wait_until_warm()
    crowd.assert_all_open()
    for victim in victims.values():
        kill(victim["pid"])
    assert crowd.finish() == undisturbed
    wait_until_whole(frail, without=next(iter(victims)), after_epoch=epoch)
    assert not set(ready_shards(frail)) & set(victims)
    tell(f"longest pause {max(stream.longest_pause_s for stream in crowd.streams):.2f} s")


def test_while_nobody_replaces_lost_shards_each_request_gets_what_its_policy_says(run_app: RunApp) -> None:
    """The controller sleeps, so nothing changes until it wakes."""
    sampling = Sampling(max_tokens=24, ignore_eos=True, temperature=0.0)
    with run_app("abandoned", shards=2, expert_wait_s=3.0) as service:
        view = service.view()
        os.kill(view["controller"]["pid"], signal.SIGSTOP)
        for shard in view["shards"]:
            kill(shard["pid"])
        address = service.cluster.grpc_address
        with ArrieroClient(address, application="abandoned", retry=RetryPolicy(max_tries=1)) as client:
            with pytest.raises(ArrieroError, match=r"UNAVAILABLE.*cannot be reached: shard shard-"):
                list(client.generate([1, 2, 3], sampling=sampling, on_missing_expert="fail"))
            pieces = list(client.generate([1, 2, 3], sampling=sampling, on_missing_expert="shared_only"))
            assert sum(len(piece.token_ids) for piece in pieces) == 24
            assert pieces[-1].degraded
            check_openai_client_hears_of_missing_experts(service)
            with pytest.raises(ArrieroError, match=r"UNAVAILABLE.*could not be reached for 3 s: shard shard-"):
                list(client.generate([1, 2, 3], sampling=sampling))
            os.kill(view["controller"]["pid"], signal.SIGCONT)
            dead = {shard["id"] for shard in view["shards"]}
            wait_until(
                lambda: dead <= {shard["id"] for shard in service.view()["shards"] if shard["state"] == "dead"},
                "the shards are seen dead",
            )
            wait_until(lambda: len(ready_shards(service)) == 2, "the shards are replaced", timeout_s=WHOLE_S)
            pieces = list(client.generate([1, 2, 3], sampling=sampling))
            assert sum(len(piece.token_ids) for piece in pieces) == 24
            assert not pieces[-1].degraded


def check_openai_client_hears_of_missing_experts(service: Service) -> None:
    client = openai_client(service)
    extra = {"on_missing_expert": "fail"}
    with pytest.raises(openai.InternalServerError) as failure:
        client.completions.create(model=MODEL, prompt=[1, 2, 3], extra_body=extra)
    assert failure.value.status_code == 503
    assert failure.value.code == "unavailable"
    assert failure.value.response.headers["retry-after"] == "1"
    extra = {"on_missing_expert": "shared_only"}
    [choice] = client.completions.create(model=MODEL, prompt=[1, 2, 3], extra_body=extra).choices
    assert choice.degraded is True
    *_, last = client.completions.create(model=MODEL, prompt=[1, 2, 3], stream=True, extra_body=extra)
    assert last.choices[0].degraded is True
