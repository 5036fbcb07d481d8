"""Chaos by hand: a service of its own, real clients, fault after fault.

    make chaos CHAOS_MINUTES=60
    PYTHONPATH=tests .venv/bin/python -m chaos.run --scenario kill-shard --times 50 --seed 7 --json shard.json

Ends with 0 when nothing was lost and nothing wrong, and everything was given back.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from holdings import Holdings
from serve_process import ServeProcess

from chaos import report
from chaos.arena import Arena
from chaos.scenario import LONG, Scenario
from chaos.target import Target
from cluster.checkpoints.presets import create_checkpoint
from cluster.launch.token_file import find_record

MAX_TOKENS = 200
# From then on memory may not grow: what is made on first use has been made.
WARM_SHARE = 1 / 6
FLAGS = ("--dtype", "float32", "--stream-interval-ms", "0", "--num-kv-blocks", "1024")


class Run:
    """Scenario after scenario, and what the processes held in between."""

    def __init__(self, arena: Arena, minutes: float | None) -> None:
        self._arena = arena
        self._begun_s = time.monotonic()
        self._minutes = minutes
        self.held: list[tuple[float, Mapping[str, Holdings]]] = []

    def play_all(self, scenarios: Sequence[Scenario]) -> None:
        """Once, or until the time is over. Raises AssertionError where a fault does not do what it should."""
        self._arena.begin()
        self._rest()
        while True:
            for scenario in scenarios:
                self._arena.play(scenario)
                self._rest()
                if self._minutes is not None and self._elapsed_s() > 60 * self._minutes:
                    return
            if self._minutes is None:
                return

    def warm(self) -> Mapping[str, Holdings]:
        """What was held when a sixth of the run was over."""
        warm_s = self._elapsed_s() * WARM_SHARE
        return next(some for at_s, some in self.held if at_s >= warm_s or at_s == self.held[-1][0])

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._begun_s

    def _rest(self) -> None:
        self.held.append((self._elapsed_s(), self._arena.rest()))


def main() -> int:
    options = _parser().parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    scenarios = _chosen(options.scenario, options.times)
    _tell(f"seed {seed}, {options.streams} streams, {options.routers} routers, {options.shards} shards")
    options.out.mkdir(parents=True, exist_ok=True)
    with _running_service(options) as target:
        arena = Arena(target, num_streams=options.streams, max_tokens=MAX_TOKENS, seed=seed, tell=_tell)
        run = Run(arena, options.minutes)
        failure = None
        try:
            run.play_all(scenarios)
            arena.check_given_back(run.warm())
        except AssertionError as error:
            failure = f"{error}"
    print(f"\n{report.table(arena.outcomes)}\n")
    if run.held:
        print(report.memory_table(run.warm(), run.held[-1][1]))
    if options.json is not None:
        about = {"seed": seed, "streams": options.streams, "failure": failure}
        options.json.write_text(json.dumps(report.to_json(arena.outcomes, run.held, **about), indent=1))
    bad = [each for outcome in arena.outcomes for each in outcome.violations] + ([failure] if failure else [])
    if bad:
        print(f"\nchaos: seed {seed}, the service's log is {options.out / 'log'}", *bad, sep="\n", file=sys.stderr)
    return 1 if bad else 0


def _chosen(names: Sequence[str] | None, times: int | None) -> list[Scenario]:
    by_name = {scenario.name: scenario for scenario in LONG}
    chosen = [by_name[name] for name in names] if names else list(LONG)
    return chosen if times is None else [replace(scenario, times=times) for scenario in chosen]


@contextmanager
def _running_service(options: argparse.Namespace) -> Iterator[Target]:
    """`arriero serve` as a user would start it, on a Ray of its own."""
    counts = {name: str(getattr(options, name)) for name in ("routers", "shards", "copies", "gateways")}
    flags = [word for name, count in counts.items() for word in (f"--{name}", count)]
    with TemporaryDirectory(prefix="arriero-chaos-") as folder:
        model = options.model or create_checkpoint("tiny-maverick", Path(folder, "tiny-maverick"))
        with ServeProcess("--model", str(model), *flags, *FLAGS, folder=options.out) as service:
            if not service.ready_line():
                raise SystemExit(f"the service did not start:\n{service.log.read_text()}")
            record = find_record(service.state_home / "arriero", service.address)
            target = Target(
                grpc_address=service.address,
                http_url=f"http://127.0.0.1:{service.http_port}",
                application=record.app_name,
                admin_token=record.admin_token,
            )
            yield target
            target.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chaos.run", description=__doc__, allow_abbrev=False)
    names = [scenario.name for scenario in LONG]
    parser.add_argument("--scenario", action="append", choices=names, help="May be given again. Default: all of them.")
    parser.add_argument("--times", type=int, help="Faults of each scenario, instead of its own number.")
    parser.add_argument("--minutes", type=float, help="Play the scenarios over and over for so long.")
    parser.add_argument("--seed", type=int, help="Of every draw. Default: drawn, and printed.")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--streams", type=int, default=32)
    for name, default in {"routers": 2, "shards": 3, "copies": 2, "gateways": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", type=Path, help="Default: a tiny-maverick of random weights.")
    parser.add_argument("--out", type=Path, default=Path("build/chaos"), help="Where the log of the service goes.")
    return parser


def _tell(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
