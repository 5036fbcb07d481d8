"""`arriero serve`: checks everything, starts the service on Ray, stays until Ctrl-C, leaves no process behind."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from contextlib import suppress

from cluster.config import ServiceConfig
from cluster.flags import add_config_flags, config_from_flags
from cluster.launch.driver_spec import DriverSpec
from cluster.launch.preflight import check_model, check_ports
from cluster.launch.supervisor import Supervisor
from cluster.launch.token_file import find_record, remove_record, state_folder

# What a stop takes besides open requests: Serve, Ray and the engines go down in about three seconds.
STOP_TIMEOUT_S = 30.0
# A socket's path has at most 107 bytes; ours and Ray's folders and names take 80 of them.
MAX_TEMP_PATH = 27


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS"),
        help="Run on the Ray cluster at this address (default: $RAY_ADDRESS) and not on one of its own.",
    )
    add_config_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    # A shell starts background jobs with SIGINT ignored; a service must be stoppable from the first moment.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config = config_from_flags(arguments)
    if arguments.address is None:
        check_ports(config)
    config = check_model(config, runs_here=arguments.address is None)
    return supervise(config, arguments.address)


def supervise(config: ServiceConfig, ray_address: str | None) -> int:
    """Returns the exit code when nothing of the service is left."""
    temp_folder = make_temp_folder()
    spec = DriverSpec(
        config=config.model_dump(), ray_address=ray_address, temp_folder=temp_folder, parent_pid=os.getpid()
    )
    supervisor = Supervisor(stop_timeout_s=STOP_TIMEOUT_S, drain_timeout_s=config.drain_timeout_s, on_ready=_print_line)
    code, failure = supervisor.run([sys.executable, "-P", "-m", "cluster.launch.driver"], stdin=spec.to_json())
    if ray_address is None:
        _remove_record(config)
    if failure is None:
        shutil.rmtree(temp_folder, ignore_errors=True)
    else:
        print(f"arriero serve: logs and stack traces are in {temp_folder}", file=sys.stderr)
        print(f"arriero serve: {failure}", file=sys.stderr)
    return code


def make_temp_folder() -> str:
    """For Ray's sockets and logs; in /tmp where the paths of the sockets would get too long for Unix."""
    base = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="arriero-", dir=base if len(base) <= MAX_TEMP_PATH else "/tmp")


def _remove_record(config: ServiceConfig) -> None:
    """The controller does that itself when it may end in peace; ours went down with Ray."""
    with suppress(FileNotFoundError):
        remove_record(find_record(state_folder(), f"127.0.0.1:{config.grpc_port}"), state_folder())


def _print_line(line: str) -> None:
    print(line, flush=True)
