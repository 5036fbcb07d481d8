"""A finished benchmark: what it is printed as and which files it leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.bench.plot import Panel, check_plots, draw
from cluster.bench.rows import Row, render_markdown, render_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """date is ISO 8601. command is what to type to get the same again; notes are sentences on how to read the rows."""

    name: str
    date: str
    command: str
    hardware: dict[str, str]
    rows: list[Row]
    panels: Sequence[Panel]
    notes: Sequence[str] = ()

    def write(self, folder: Path) -> list[Path]:
        """``NAME-DATE.json``, ``.md`` and ``.png``; an older report of the same name and day is replaced.

        Raises ValueError without matplotlib, OSError.
        """
        check_plots()
        folder.mkdir(parents=True, exist_ok=True)
        data, page, plot = (folder / f"{self.name}-{self.date}{suffix}" for suffix in (".json", ".md", ".png"))
        data.write_text(json.dumps(self._data(), indent=1) + "\n", encoding="utf-8")
        page.write_text(self.markdown(), encoding="utf-8")
        draw(self.rows, self.panels, plot, f"{self.name}, {self.date}")
        return [path for path in (data, page, plot) if path.exists()]

    def text(self) -> str:
        return render_text(self.rows)

    def json_rows(self) -> str:
        return json.dumps(self.rows)

    def markdown(self) -> str:
        facts = "\n".join(f"- {name}: {value}" for name, value in self.hardware.items())
        notes = "".join(f"\n{note}\n" for note in self.notes)
        return (
            f"# {self.name}, {self.date}\n\n```\n{self.command}\n```\n{notes}\n"
            f"{render_markdown(self.rows)}\n\n## Machine\n{facts}\n"
        )

    def _data(self) -> dict[str, object]:
        return {
            "name": self.name,
            "date": self.date,
            "command": self.command,
            "hardware": self.hardware,
            "notes": list(self.notes),
            "rows": self.rows,
        }
