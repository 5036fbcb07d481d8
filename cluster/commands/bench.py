"""`arriero bench`: one subcommand for each thing that is measured."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cluster.bench import dispatch_command, engine_command, serve_command

if TYPE_CHECKING:
    from cluster.cli import Command

BENCHES: dict[str, tuple[Command, str]] = {
    "engine": (engine_command, "decode steps and prefill of the engine, and of others beside it"),
    "dispatch": (dispatch_command, "rows to expert shards and back"),
    "serve": (serve_command, "what clients of a running service see under load"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    for name, (module, summary) in BENCHES.items():
        description = f"Measure {summary}. Absolute figures move with the machine: compare within one run."
        module.add_arguments(benches.add_parser(name, help=summary, description=description))


def run(arguments: argparse.Namespace) -> int:
    module, _summary = BENCHES[arguments.bench]
    return module.run(arguments)
