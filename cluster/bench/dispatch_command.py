"""The command line of `arriero bench dispatch`."""

from __future__ import annotations

import argparse

from cluster.bench.flags import (
    add_output_arguments,
    check_output,
    finish,
    name_list,
    positive,
    positive_list,
    usable_cores,
)
from cluster.bench.hardware import describe_hardware


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", type=positive, default=4, metavar="N", help="Shard processes. Default: 4.")
    parser.add_argument(
        "--rows", type=positive_list, default=(8,), metavar="N,..", help="Rows of a dispatch, in all. Default: 8."
    )
    parser.add_argument("--row-bytes", type=positive, default=1024, metavar="N", help="Of one row. Default: 1024.")
    parser.add_argument(
        "--transports", type=name_list, default=None, metavar="NAME,..", help="Default: all that there are."
    )
    parser.add_argument("--samples", type=positive, default=2000, metavar="N", help="Round trips. Default: 2000.")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads here. Default: 1.")
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    check_output(arguments)
    # Loads torch.
    from cluster.bench.dispatch_bench import NOTES, PANELS, TRANSPORTS, DispatchCases, run_dispatch_bench

    cases = DispatchCases(
        transports=TRANSPORTS if arguments.transports is None else arguments.transports,
        num_shards=arguments.shards,
        num_rows=arguments.rows,
        row_bytes=arguments.row_bytes,
        num_samples=arguments.samples,
        num_threads=min(arguments.threads, usable_cores()),
    )
    hardware = describe_hardware()
    rows = run_dispatch_bench(cases)
    return finish(arguments, name="dispatch", rows=rows, panels=PANELS, notes=NOTES, hardware=hardware)
