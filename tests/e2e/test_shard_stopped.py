"""A shard is stopped (SIGSTOP) under open streams, while a copy of what it holds lives: it is routed around, and comes
back when it wakes. The view says what became of it, the tokens that nobody noticed."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from conftest import RunApp, Service, Tell, wait_until
from crowd import WHOLE_S, Crowd

pytestmark = pytest.mark.cluster


def shard_of(service: Service, shard_id: str) -> dict[str, Any]:
    return next(shard for shard in service.view()["shards"] if shard["id"] == shard_id)


def test_streams_outlive_a_stopped_shard_and_it_comes_back(run_app: RunApp, tell: Tell) -> None:
    with run_app("drowsy", routers=2, shards=3, copies=2, stream_interval_ms=0) as service:
        undisturbed = Crowd(service, "undisturbed").finish()
        before = service.view()
        victim = before["shards"][0]
        crowd = Crowd(service, "stop")
        crowd.wait_until_warm()
        crowd.assert_all_open()
        os.kill(victim["pid"], signal.SIGSTOP)
        try:
            assert crowd.finish() == undisturbed
            wait_until(lambda: shard_of(service, victim["id"])["state"] == "suspect", "the shard is a suspect")
        finally:
            os.kill(victim["pid"], signal.SIGCONT)
        wait_until(
            lambda: (
                (shard := shard_of(service, victim["id"]))["state"] == "ready"
                and sorted(shard["slots"]) == sorted(victim["slots"])
            ),
            "the shard has its slots again",
            timeout_s=WHOLE_S,
        )
        assert shard_of(service, victim["id"])["pid"] == victim["pid"]
        assert Crowd(service, "awake").finish() == undisturbed
        tell(f"longest pause {max(stream.longest_pause_s for stream in crowd.streams):.2f} s")
