"""The command line of `arriero bench serve`."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from cluster.bench.flags import (
    PRESET_FOLDER,
    add_output_arguments,
    check_output,
    finish,
    positive,
    preset_checkpoint,
)
from cluster.bench.hardware import describe_hardware
from cluster.checkpoints.presets import PRESETS
from cluster.service_model import read_model_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    service = parser.add_argument_group("service", "One that runs, or by default one of its own, with two shards.")
    service.add_argument("--address", metavar="HOST:PORT", help="gRPC address of a running service.")
    service.add_argument("--url", metavar="URL", help="HTTP address of a running service, http://HOST:PORT.")
    service.add_argument("--model", type=Path, metavar="DIR", help="The checkpoint folder that is served.")
    service.add_argument("--preset", choices=sorted(PRESETS), default="mid", help="Random weights. Default: mid.")
    service.add_argument("--cache", type=Path, default=PRESET_FOLDER, metavar="DIR", help="As of bench engine.")
    service.add_argument(
        "--serve-args", default="--shards 2", metavar="FLAGS",
        help="Further flags of `arriero serve` for the service of its own. Default: --shards 2.",
    )  # fmt: skip
    load = parser.add_argument_group("load")
    load.add_argument("--rate", type=rates, default=(0.5, 1.0, 2.0), metavar="X,..", help="Requests per second.")
    load.add_argument("--requests", type=positive, default=30, metavar="N", help="Of each rate. Default: 30.")
    load.add_argument("--prompt-tokens", type=positive, default=64, metavar="N", help="Default: 64.")
    load.add_argument("--max-tokens", type=positive, default=64, metavar="N", help="Default: 64.")
    load.add_argument("--goal-ttft-ms", type=float, default=500.0, metavar="X", help="Default: 500.")
    load.add_argument("--goal-tpot-ms", type=float, default=100.0, metavar="X", help="Default: 100.")
    load.add_argument("--timeout-s", type=float, default=120.0, metavar="X", help="Of one answer. Default: 120.")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="Of arrivals and prompts. Default: 0.")
    add_output_arguments(parser)


def rates(text: str) -> tuple[float, ...]:
    found = tuple(float(part) for part in text.split(","))
    if min(found) <= 0:
        raise argparse.ArgumentTypeError(f"must be positive numbers, got {text!r}")
    return found


def run(arguments: argparse.Namespace) -> int:
    check_output(arguments)
    folder = arguments.model or preset_checkpoint(arguments.preset, arguments.cache)
    vocab_size = read_model_config(folder).vocab_size
    from cluster.bench import serve_bench
    from cluster.bench.stream_timing import Goal
    from cluster.launch.served import Served

    hardware = describe_hardware()
    with ExitStack() as closing:
        address, url = arguments.address, arguments.url
        if address is None and url is None:
            flags = ["--model", str(folder), *arguments.serve_args.split()]
            service = closing.enter_context(Served(flags, ready_timeout_s=600.0))
            address, url = service.grpc_address, service.http_url
        cases = serve_bench.ServeCases(
            grpc_address=address,
            http_url=url,
            rates=arguments.rate,
            num_requests=arguments.requests,
            prompt_tokens=arguments.prompt_tokens,
            max_tokens=arguments.max_tokens,
            vocab_size=vocab_size,
            goal=Goal(time_to_first_s=arguments.goal_ttft_ms / 1e3, time_per_token_s=arguments.goal_tpot_ms / 1e3),
            timeout_s=arguments.timeout_s,
            seed=arguments.seed,
        )
        rows = serve_bench.run(cases)
    return finish(
        arguments, name="serve", rows=rows, panels=serve_bench.PANELS, notes=serve_bench.NOTES, hardware=hardware
    )
