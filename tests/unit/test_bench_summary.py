"""A benchmark's numbers: percentiles as numpy has them, and rows as tables."""

from __future__ import annotations

import random

import numpy as np
import pytest

from cluster.bench.plot import Panel
from cluster.bench.report import Report
from cluster.bench.rows import Row, render_markdown, render_text
from cluster.bench.summary import percentile, spread_ms


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("percent", [0, 10, 50, 90, 99, 100])
def test_percentiles_are_those_of_numpy(count: int, percent: float) -> None:
    rng = random.Random(count)
    values = [rng.random() for _ in range(count)]
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-12)


def test_a_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        percentile([], 50)


@pytest.mark.parametrize("percent", [-1, 101])
def test_a_percent_outside_its_range_is_refused(percent: float) -> None:
    with pytest.raises(ValueError, match="percent must be between 0 and 100"):
        percentile([1.0], percent)


def test_spread_is_in_milliseconds() -> None:
    assert spread_ms([0.003, 0.001, 0.002]) == {"p50_ms": 2.0, "p10_ms": 1.2, "p90_ms": 2.8, "min_ms": 1.0}


ROWS: list[Row] = [
    {"bench": "decode", "batch": 1, "p50_ms": 12.3456, "absent": None},
    {"bench": "engine", "contestant": "vllm", "absent": "no module | named\nvllm"},
]


def test_the_text_table_aligns_columns_and_leaves_empty_ones_out() -> None:
    assert render_text([{"bench": "decode", "batch": 1, "none": None}, {"bench": "x", "batch": 32}]).splitlines() == [
        "bench   batch",
        "decode      1",
        "x          32",
    ]


def test_the_markdown_table_has_every_column_of_any_row() -> None:
    assert render_markdown(ROWS).splitlines() == [
        "| bench | batch | p50_ms | contestant | absent |",
        "| --- | --- | --- | --- | --- |",
        "| decode | 1 | 12.3 |  |  |",
        "| engine |  |  | vllm | no module / named vllm |",
    ]


def test_a_panel_takes_the_rows_that_match_and_have_its_number() -> None:
    panel = Panel(title="", x="batch", y="p50_ms", series="contestant", where={"bench": "decode"})
    assert panel.rows([*ROWS, {"bench": "decode", "batch": 2}]) == ROWS[:1]


def test_a_report_says_how_to_get_it_again_and_what_it_ran_on() -> None:
    report = Report(
        name="engine",
        date="2026-01-02",
        command="arriero bench engine --batch 1",
        hardware={"cpu": "a fast one", "torch": "2.13.0"},
        rows=ROWS,
        panels=(),
        notes=("Read it so.",),
    )
    page = report.markdown()
    for part in ("# engine, 2026-01-02", "arriero bench engine --batch 1", "Read it so.", "- cpu: a fast one"):
        assert part in page
    assert render_markdown(ROWS) in page
