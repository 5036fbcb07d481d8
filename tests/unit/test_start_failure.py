"""The one line that says why a service did not start."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from cluster.launch import driver
from cluster.launch.driver_spec import DriverSpec
from cluster.launch.start_failure import start_failure

REPLICA = """The deployment failed to start 1 times in a row. This may be due to a problem with its constructor or \
initial health check failing. See controller logs for details. Error:
ray::ServeReplica:arriero:Router.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "/x/replica.py", line 1928, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "/x/router/engine_client.py", line 61, in start
    raise EngineDiedError(message.error)
router.engine_client.EngineDiedError: max_model_len 4096 does not fit: the KV cache may take 0.01 GiB
"""


def test_the_cause_is_the_replicas_own_exception() -> None:
    wrapper = "Deploying application arriero failed: Failed to update the deployments ['Router']."
    assert start_failure([wrapper, "", REPLICA]) == "max_model_len 4096 does not fit: the KV cache may take 0.01 GiB"


def test_a_plain_message_stands_for_itself() -> None:
    assert start_failure(["No route to the cluster\nat all"]) == "No route to the cluster"


def test_a_mere_wrapper_is_better_than_nothing() -> None:
    assert start_failure(["trace\nRuntimeError: the proxy is deaf"]) == "the proxy is deaf"


def test_no_message_at_all_is_said_so() -> None:
    assert "no reason" in start_failure([""])


def test_without_a_ray_nobody_is_asked_why_it_did_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve would start a Ray of its own to answer."""

    def fail(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("The current node timed out during startup.")

    monkeypatch.setattr(driver, "start_ray", fail)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("another Ray is started"))
    spec = DriverSpec(config={"model": "m"}, ray_address=None, temp_folder=str(tmp_path), parent_pid=1)
    service = driver.Service(spec)
    with pytest.raises(RuntimeError) as failure:
        service.start(driver.StopSignals())
    assert service.why_failed(failure.value) == "The current node timed out during startup."
