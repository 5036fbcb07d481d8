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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from holdings import Holdings

from chaos import report
from chaos.arena import Arena
from chaos.scenario import LONG, Scenario
from chaos.service import running_service

MAX_TOKENS = 200
# From then on memory may not grow: what is made on first use has been made.
WARM_SHARE = 1 / 6


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
    counts = {name: str(getattr(options, name)) for name in ("routers", "shards", "copies", "gateways")}
    flags = [word for name, count in counts.items() for word in (f"--{name}", count)]
    with running_service(flags, folder=options.out, model=options.model) as target:
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
