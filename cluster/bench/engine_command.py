"""The command line of `arriero bench engine`."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.bench.flags import (
    PRESET_FOLDER,
    add_output_arguments,
    check_output,
    finish,
    name_list,
    positive,
    positive_list,
    preset_checkpoint,
    usable_cores,
)
from cluster.bench.hardware import describe_hardware
from cluster.checkpoints.presets import PRESETS
from cluster.service_model import read_model_config

if TYPE_CHECKING:
    from cluster.bench.engine_bench import EngineCases
    from cluster.bench.race import Race
    from cluster.bench.shard_children import ShardTierSpec

PEERS = ("transformers", "llama.cpp", "vllm")
MODES = ("auto", "on", "off")
EXPERT_DTYPES = ("auto", "int8", "int4")
ARRIERO = "arriero"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, metavar="DIR", help="A checkpoint folder.")
    model.add_argument("--preset", choices=sorted(PRESETS), default="mid", help="Random weights. Default: mid.")
    parser.add_argument(
        "--cache", type=Path, default=PRESET_FOLDER, metavar="DIR",
        help=f"Where a preset's checkpoint is made, and kept for the next time. Default: {PRESET_FOLDER}.",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="Default: bfloat16.")
    parser.add_argument(
        "--expert-dtype", type=name_list, default=("auto",), metavar="NAME,..",
        help=f"Of {', '.join(EXPERT_DTYPES)}: as the key of serve, a contestant for each. Default: auto.",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of each contestant. Default: all.")
    _add_case_arguments(parser.add_argument_group("cases"))
    _add_shard_arguments(parser.add_argument_group("experts in shards"))
    _add_peer_arguments(parser.add_argument_group("contestants"))
    add_output_arguments(parser)


def _add_case_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch",
        type=positive_list,
        default=(1, 8, 32),
        metavar="N,..",
        help="Sequences. Default: 1,8,32.",
    )
    group.add_argument("--prompt-tokens", type=positive, default=64, metavar="N", help="Of those. Default: 64.")
    group.add_argument(
        "--prefill", type=positive_list, default=(512, 2048), metavar="N,..", help="Prompt lengths. Default: 512,2048."
    )
    group.add_argument("--steps", type=positive, default=40, metavar="N", help="Decode steps timed. Default: 40.")
    group.add_argument("--prefills", type=positive, default=6, metavar="N", help="Prefills timed. Default: 6.")


def _add_shard_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--shards", type=int, default=0, metavar="N", help="Shard processes. 0: experts in the router. Default: 0."
    )
    group.add_argument("--shard-threads", type=positive, default=1, metavar="N", help="Of each shard. Default: 1.")
    group.add_argument(
        "--routers", type=positive_list, default=(1,), metavar="N,..",
        help="Routers that work at the same time on the same shards, a contestant for each number. Default: 1.",
    )  # fmt: skip
    group.add_argument(
        "--micro-batches", type=name_list, default=("auto",), metavar="MODE,..",
        help=f"Of {', '.join(MODES)}: as the key of serve, a contestant for each. Default: auto.",
    )  # fmt: skip
    group.add_argument(
        "--transport", choices=("shm", "tcp"), default="shm", help="From routers to shards. Default: shm."
    )
    group.add_argument(
        "--shard-latency-ms", type=float, metavar="X",
        help="Simulated: shards sleep this long for each expert they are asked for, and compute nothing.",
    )  # fmt: skip
    group.add_argument(
        "--shard-row-us", type=float, default=0.0, metavar="X",
        help="With --shard-latency-ms: and this long for each row. Default: 0.",
    )  # fmt: skip


def _add_peer_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--peers", type=name_list, default=(), metavar="NAME,..", help=f"Of {', '.join(PEERS)}. Default: none."
    )
    group.add_argument(
        "--peer-python", type=_pair, action="append", default=[], metavar="NAME=PYTHON",
        help="An interpreter that has the peer's library. Default: this one.",
    )  # fmt: skip
    group.add_argument("--gguf", type=Path, metavar="FILE", help="The same model for llama.cpp, in its format.")
    group.add_argument(
        "--vllm-processes", type=positive, default=1, metavar="N", help="vLLM's tensor parallelism. Default: 1."
    )
    group.add_argument(
        "--beside", type=_pair, action="append", default=[], metavar="NAME=DIR",
        help="Another checkout of arriero that takes part, to see what a change does.",
    )  # fmt: skip


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, value


def run(arguments: argparse.Namespace) -> int:
    check_output(arguments)
    _check(arguments)
    folder = arguments.model or preset_checkpoint(arguments.preset, arguments.cache)
    config = read_model_config(folder)
    from cluster.bench.engine_bench import NOTES, PANELS, EngineCases, run_engine_bench
    from cluster.bench.race import Race

    cases = EngineCases(
        batches=arguments.batch,
        prompt_tokens=arguments.prompt_tokens,
        prefill_tokens=arguments.prefill,
        num_steps=arguments.steps,
        num_prefills=arguments.prefills,
        vocab_size=config.vocab_size,
    )
    threads = arguments.threads or usable_cores()
    hardware = describe_hardware()
    with ExitStack() as closing:
        race = Race()
        _enter(race, arguments, folder, cases, threads, closing)
        rows = run_engine_bench(race, cases, {"dtype": arguments.dtype, "threads": threads})
    return finish(
        arguments, name="engine", rows=rows, panels=PANELS, notes=NOTES, versions=race.versions, hardware=hardware
    )


def _check(arguments: argparse.Namespace) -> None:
    """Raises ValueError naming the flag."""
    if unknown := set(arguments.peers) - set(PEERS):
        raise ValueError(f"--peers must be of {', '.join(PEERS)}, got {', '.join(sorted(unknown))}")
    if unknown := {name for name, _python in arguments.peer_python} - set(PEERS):
        raise ValueError(f"--peer-python must name one of {', '.join(PEERS)}, got {', '.join(sorted(unknown))}")
    if arguments.shards < 0:
        raise ValueError(f"--shards must be at least 0, got {arguments.shards}")
    if unknown := set(arguments.expert_dtype) - set(EXPERT_DTYPES):
        raise ValueError(f"--expert-dtype must be of {', '.join(EXPERT_DTYPES)}, got {', '.join(sorted(unknown))}")
    if unknown := set(arguments.micro_batches) - set(MODES):
        raise ValueError(f"--micro-batches must be of {', '.join(MODES)}, got {', '.join(sorted(unknown))}")
    if not arguments.shards and arguments.routers != (1,):
        raise ValueError("--routers needs --shards: routers without shards have nothing in common")
    if not arguments.shards and arguments.shard_latency_ms is not None:
        raise ValueError("--shard-latency-ms needs --shards")
    if arguments.shard_row_us and arguments.shard_latency_ms is None:
        raise ValueError("--shard-row-us needs --shard-latency-ms")
    for name in ("shard_latency_ms", "shard_row_us"):
        if (getattr(arguments, name) or 0) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {getattr(arguments, name):g}")


def _enter(
    race: Race, arguments: argparse.Namespace, folder: Path, cases: EngineCases, threads: int, closing: ExitStack
) -> None:
    from cluster.bench.contestant import start_arriero, start_peer
    from cluster.bench.peers.line_protocol import Setup

    setup = Setup(
        model=str(folder),
        dtype=arguments.dtype,
        num_threads=threads,
        max_sequences=cases.max_sequences,
        max_tokens=cases.max_tokens,
    )
    arriero = partial(
        start_arriero, setup=setup, closing=closing, tier=_tier(arguments, folder), transport=arguments.transport
    )
    for num_routers, mode, expert_dtype in product(arguments.routers, arguments.micro_batches, arguments.expert_dtype):
        name = _name(num_routers, mode, expert_dtype, arguments)
        race.join(
            name,
            partial(arriero, name, num_routers=num_routers, micro_batches=mode, expert_dtype=expert_dtype),
        )
    for name, root in arguments.beside:
        race.join(name, partial(arriero, name, root=Path(root)))
    pythons = dict(arguments.peer_python)
    for name in arguments.peers:
        if name == "llama.cpp" and arguments.gguf is None:
            race.miss(name, "it reads GGUF files only: give --gguf FILE")
            continue
        options = {"gguf": str(arguments.gguf), "processes": arguments.vllm_processes}
        peer_setup = replace(setup, options=options)
        race.join(name, partial(start_peer, name, peer_setup, pythons.get(name, sys.executable), closing))


def _name(num_routers: int, mode: str, expert_dtype: str, arguments: argparse.Namespace) -> str:
    """What tells it from the others."""
    routers = f" {num_routers} routers" if len(arguments.routers) > 1 else ""
    halves = f" micro-batches {mode}" if len(arguments.micro_batches) > 1 else ""
    experts = f" experts {expert_dtype}" if len(arguments.expert_dtype) > 1 else ""
    return ARRIERO + routers + halves + experts


def _tier(arguments: argparse.Namespace, folder: Path) -> ShardTierSpec | None:
    if not arguments.shards:
        return None
    from cluster.bench.shard_children import ShardTierSpec

    config = read_model_config(folder)
    latency_ms = arguments.shard_latency_ms
    return ShardTierSpec(
        num_shards=arguments.shards,
        model=str(folder.absolute()),
        shape=config.expert_shape,
        moe_layers=config.moe_layers,
        dtype=arguments.dtype,
        num_threads=arguments.shard_threads,
        echo_s=None if latency_ms is None else latency_ms / 1e3,
        echo_row_s=arguments.shard_row_us / 1e6,
    )
