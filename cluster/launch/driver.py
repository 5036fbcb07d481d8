"""The process that owns Ray: starts the service, says that it is ready, stops it when told to.

Its supervisor may kill it at any time. SIGINT stops now: open streams break. SIGTERM lets open requests go on
for the configured time first. Ray's own output is this process's stdout and stderr, both the supervisor's stderr.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

from cluster.config import parse_config
from cluster.launch.driver_spec import DriverSpec
from cluster.launch.processes import adopt_orphans, end_descendants
from cluster.launch.ray_setup import DRIVER, ServeSetup, set_environment, start_ray, start_serve
from cluster.launch.start_failure import start_failure
from cluster.launch.supervisor import SWEEP_TIMEOUT_S, Report, send_report
from experts.logs import configure_logging
from router.parent_death import end_with_parent

logger = logging.getLogger("arriero")

DELETE_TIMEOUT_S = 15.0
DELETE_POLL_S = 0.1
FAILURE_FILE = "start-failure.txt"


class Stopped(KeyboardInterrupt):
    """A signal told us to stop. Ray's blocking calls let only a KeyboardInterrupt through."""


class StopSignals:
    """Raises Stopped in the main thread at the first SIGINT or SIGTERM and ignores all others."""

    def __init__(self) -> None:
        self.drain = False
        self._received = False

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            return
        self._received = True
        self.drain = number == signal.SIGTERM
        raise Stopped


class Service:
    """One application on Ray, from ray.init to ray.shutdown."""

    def __init__(self, spec: DriverSpec) -> None:
        self._spec = spec
        self._config = parse_config(spec.config)
        self._owns_ray = spec.ray_address is None
        self._began = False
        self._started_serve = False

    def start(self, stop_signals: StopSignals) -> str:
        """Returns the ready line once both addresses answer. Raises whatever Ray or the application raises."""
        from ray import serve

        from cluster.app import build

        # Only from here on is there anything to stop; a signal may even have broken off the imports.
        self._began = True
        start_ray(self._config, ray_address=self._spec.ray_address, temp_folder=self._spec.temp_folder)
        # Ray has put its own handlers in place.
        stop_signals.install()
        setup = start_serve(self._config)
        self._started_serve = setup.started
        serve.run(build(self._spec.config), name=self._config.app_name)
        return ready_line(setup)

    def why_failed(self, error: Exception) -> str:
        """One line. The whole story, with the stack traces of all processes, goes into a file beside Ray's logs."""
        story = "\n".join([*traceback.format_exception(error), *self._deployment_messages()])
        Path(self._spec.temp_folder, FAILURE_FILE).write_text(story)
        return start_failure([str(error), *self._deployment_messages()])

    def _deployment_messages(self) -> list[str]:
        """What Serve has to say about each deployment of the application, as far as there is one."""
        if not self._began:
            return []
        import ray
        from ray import serve

        if not ray.is_initialized():
            # Serve would start a Ray of its own only to ask it.
            return []
        try:
            application = serve.status().applications[self._config.app_name]
        except (KeyError, ray.exceptions.RayError, ray.serve.exceptions.RayServeException):
            return []
        return [deployment.message for deployment in application.deployments.values()]

    def stop(self, *, drain: bool) -> None:
        """Leaves nothing of the service behind; on a Ray cluster of our own no Ray either."""
        if not self._began:
            return
        import ray
        from ray import serve

        if not ray.is_initialized():
            return
        if drain or not self._owns_ray:
            drain_timeout_s = self._config.drain_timeout_s if drain else 0.0
            self._delete_app(drain_timeout_s)
            self._retire_controller(drain_timeout_s)
            if self._started_serve:
                serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()

    def _delete_app(self, drain_timeout_s: float) -> None:
        from ray import serve

        name = self._config.app_name
        serve.delete(name, _blocking=False)
        deadline = time.monotonic() + drain_timeout_s + DELETE_TIMEOUT_S
        while name in serve.status().applications:
            if time.monotonic() > deadline:
                logger.warning("the application %s is still there: stopping all the same", name)
                return
            time.sleep(DELETE_POLL_S)

    def _retire_controller(self, drain_timeout_s: float) -> None:
        """It would go by itself some time after the application; here it takes the shards down at once."""
        import ray

        from cluster.control.controller_link import find_controller

        controller = find_controller(self._config.app_name)
        if controller is None:
            return
        try:
            ray.get(controller.retire.remote(), timeout=drain_timeout_s + DELETE_TIMEOUT_S)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            # It ends itself right after its answer, which may get lost.
            logger.info("the controller went without an answer: %s", type(error).__name__)


def ready_line(setup: ServeSetup) -> str:
    host = "127.0.0.1" if setup.http_host in ("0.0.0.0", "::") else setup.http_host
    return f"arriero ready grpc=127.0.0.1:{setup.grpc_port} http={host}:{setup.http_port}"


def run(spec: DriverSpec) -> int:
    """Returns the exit code: 0 when it was told to stop, 1 when it failed; the failure has been reported."""
    stop_signals = StopSignals()
    service = Service(spec)
    try:
        stop_signals.install()
        send_report(Report(ready=service.start(stop_signals)))
        threading.Event().wait()
    except (KeyboardInterrupt, SystemExit):
        service.stop(drain=stop_signals.drain)
    except Exception as error:  # noqa: BLE001 the edge of the process: reported, and written to a file
        send_report(Report(failed=service.why_failed(error)))
        service.stop(drain=False)
        return 1
    return 0


def main() -> None:
    spec = DriverSpec.from_json(sys.stdin.buffer.read())
    configure_logging(parse_config(spec.config).log_settings, process=DRIVER)
    end_with_parent(spec.parent_pid, signal.SIGINT)
    adopt_orphans()
    # Ray adds the current folder to its workers' import path; nothing of the user's may shadow our packages.
    os.chdir(spec.temp_folder)
    set_environment(spec.ray_address)
    code = 1
    try:
        code = run(spec)
    finally:
        end_descendants(SWEEP_TIMEOUT_S)
        if code == 0:
            shutil.rmtree(spec.temp_folder, ignore_errors=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
