"""`arriero checkpoint create`: a checkpoint with random weights, in the published layout."""

from __future__ import annotations

import argparse
from pathlib import Path

from cluster.checkpoints.presets import PRESETS, create_checkpoint
from cluster.progress_bar import progress_bars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser(
        "create",
        help="write random weights and a byte-level tokenizer",
        description="Write a checkpoint with random weights and a byte-level tokenizer.",
    )
    create.add_argument("--preset", required=True, choices=sorted(PRESETS), help="Shape and size of the model.")
    create.add_argument("--out", required=True, type=Path, metavar="DIR", help="A new or empty folder.")
    create.add_argument("--seed", type=int, default=0, metavar="N", help="Seed of the weights. Default: 0.")
    create.add_argument(
        "--expert-skew",
        metavar="SHARE:N",
        help="Have about SHARE of the tokens go to the first N experts of each layer, e.g. 0.8:2.",
    )


def run(arguments: argparse.Namespace) -> int:
    with progress_bars() as bar:
        folder = create_checkpoint(
            arguments.preset,
            arguments.out,
            seed=arguments.seed,
            expert_skew=arguments.expert_skew,
            progress=bar("weights"),
        )
    print(folder)
    return 0
