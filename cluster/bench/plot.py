"""Grouped bars of a benchmark's rows, as a PNG. Needs matplotlib, the extra `bench`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.bench.rows import Row

BAR_SPACE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """The rows that have ``y`` and match ``where``, one group of bars per value of ``x``, one colour per value of
    ``series``."""

    title: str
    x: str
    y: str
    series: str
    where: Row

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        return [
            row
            for row in rows
            if row.get(self.y) is not None and all(row.get(name) == value for name, value in self.where.items())
        ]


def check_plots() -> None:
    """Raises ValueError when there is no matplotlib: before anything is measured, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--out draws a plot, which needs matplotlib: pip install 'arriero[bench]'") from None


def draw(rows: Sequence[Row], panels: Sequence[Panel], path: Path, title: str) -> None:
    """Panels without rows are left out; without any nothing is written."""
    from matplotlib.figure import Figure

    filled = [(panel, found) for panel in panels if (found := panel.rows(rows))]
    if not filled:
        return
    figure = Figure(figsize=(6 * len(filled), 4.5), layout="constrained")
    figure.suptitle(title)
    for axes, (panel, found) in zip(figure.subplots(1, len(filled), squeeze=False)[0], filled, strict=True):
        _draw_panel(axes, panel, found)
    figure.savefig(path, dpi=100)


def _draw_panel(axes: Any, panel: Panel, rows: Sequence[Row]) -> None:
    groups = list(dict.fromkeys(row[panel.x] for row in rows))
    names = list(dict.fromkeys(row[panel.series] for row in rows))
    width = BAR_SPACE / len(names)
    for index, name in enumerate(names):
        own = [row for row in rows if row[panel.series] == name]
        places = [groups.index(row[panel.x]) + (index + 0.5) * width - BAR_SPACE / 2 for row in own]
        bars = axes.bar(places, [row[panel.y] for row in own], width, label=str(name))
        axes.bar_label(bars, fmt="%.3g", fontsize=8)
    axes.set_xticks(range(len(groups)), [str(group) for group in groups])
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.set_title(panel.title)
    axes.legend(fontsize=8)
