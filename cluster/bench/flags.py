"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.bench.plot import Panel, check_plots
from cluster.bench.report import Report
from cluster.bench.rows import Row
from cluster.checkpoints.presets import create_checkpoint
from cluster.progress_bar import progress_bars

PRESET_FOLDER = Path(tempfile.gettempdir()) / "arriero-bench"


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def positive_list(text: str) -> tuple[int, ...]:
    """Numbers separated by commas; an empty text is an empty list."""
    return tuple(positive(part) for part in text.split(",") if part)


def name_list(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def preset_checkpoint(preset: str, cache: Path) -> Path:
    """Made once, then found again."""
    folder = cache / preset
    if not (folder / "config.json").exists():
        with progress_bars() as bar:
            create_checkpoint(preset, folder, progress=bar(f"making {folder}"))
    return folder


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="Print the rows as a JSON list instead of a table.")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="Also write NAME-DATE.json, .md and .png (needs matplotlib) into DIR."
    )


def check_output(arguments: argparse.Namespace) -> None:
    """Before anything is measured. Raises ValueError."""
    if arguments.out is not None:
        check_plots()


def finish(
    arguments: argparse.Namespace,
    *,
    name: str,
    rows: list[Row],
    panels: Sequence[Panel],
    notes: Sequence[str],
    versions: Mapping[str, str] | None = None,
    hardware: Mapping[str, str],
) -> int:
    """Prints the rows and writes the report where one is wanted. Returns the exit code: 1 when nothing was measured."""
    report = Report(
        name=name,
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        command=shlex.join(["arriero", *arguments.command_line]),
        hardware={**hardware, **(versions or {})},
        rows=rows,
        panels=panels,
        notes=notes,
    )
    print(report.json_rows() if arguments.json else report.text())
    if arguments.out is not None:
        report.write(arguments.out)
    return 0 if any("num_samples" in row for row in rows) else 1
