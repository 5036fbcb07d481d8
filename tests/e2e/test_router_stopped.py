"""A router's engine is stopped (SIGSTOP) under open streams: others take them over, and when it wakes nothing that it
says is heard, and it takes requests again."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from conftest import RunApp, Service, Tell, wait_until
from crowd import Crowd

pytestmark = pytest.mark.cluster


def router_of(service: Service, router_id: str) -> dict[str, Any]:
    return next(router for router in service.view()["routers"] if router["id"] == router_id)


def test_streams_outlive_a_stopped_router_and_it_takes_requests_again(run_app: RunApp, tell: Tell) -> None:
    with run_app("dozing", routers=2, shards=2, stream_interval_ms=0) as service:
        undisturbed = Crowd(service, "undisturbed").finish()
        victim = service.view()["routers"][0]
        crowd = Crowd(service, "stop")
        crowd.wait_until_warm()
        crowd.assert_all_open()
        os.kill(victim["pid"], signal.SIGSTOP)
        try:
            wait_until(lambda: router_of(service, victim["id"])["state"] == "suspect", "the router is a suspect")
            assert crowd.finish() == undisturbed
            paused = [stream for stream in crowd.streams if stream.longest_pause_s > 1.0]
            assert paused, "no stream was with the router that was stopped"
            assert Crowd(service, "asleep").finish() == undisturbed
        finally:
            os.kill(victim["pid"], signal.SIGCONT)
        wait_until(lambda: router_of(service, victim["id"])["state"] == "ready", "the router is back")
        assert router_of(service, victim["id"])["pid"] == victim["pid"]
        assert Crowd(service, "awake").finish() == undisturbed
        tell(f"longest pause {max(stream.longest_pause_s for stream in paused):.2f} s of {len(paused)} streams")
