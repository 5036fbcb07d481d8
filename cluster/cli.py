"""The command `arriero`. Each subcommand is a module that is imported only when it is asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Protocol, cast

COMMANDS = {
    "serve": "serve a model over gRPC until Ctrl-C",
    "generate": "answer one prompt in this process, without a server",
    "checkpoint": "make checkpoints with random weights to try things on",
    "chat": "chat with a running service in the terminal",
    "scale": "change the number of expert shards of a running service",
    "update": "put other weights of the same model into a running service, under traffic",
    "bench": "measure the engine, the lanes or a running service",
    "status": "show the members, expert shards and load of a running service",
    "rebalance": "move experts of a running service to where their load is even, or show what that would bring",
}


INTERRUPTED = 130


class Command(Protocol):
    """What a module of cluster.commands offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int:
        """Returns the exit code. Raises ValueError or OSError for what the caller can put right."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 is the caller's mistake, said in one line on stderr; 1 is ours or the machine's."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(argv: Sequence[str]) -> int:
    name = next((word for word in argv if word in COMMANDS), None)
    command = None if name is None else load_command(name)
    arguments = _parser(command, name).parse_args(argv)
    arguments.command_line = argv
    assert command is not None, "argparse lets only known commands through"
    try:
        return command.run(arguments)
    except (ValueError, OSError) as error:
        print(f"arriero {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser(command: Command | None, name: str | None) -> argparse.ArgumentParser:
    """Knows all commands by name, and the arguments of the given one."""
    parser = argparse.ArgumentParser(prog="arriero", description="Serve Llama 4 class mixture-of-experts models.")
    parser.add_argument("--version", action="version", version=f"arriero {version('arriero')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for each, summary in COMMANDS.items():
        subparser = subparsers.add_parser(each, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if command is not None and each == name:
            command.add_arguments(subparser)
    return parser


def load_command(name: str) -> Command:
    return cast("Command", import_module(f"cluster.commands.{name}"))


if __name__ == "__main__":
    sys.exit(main())
