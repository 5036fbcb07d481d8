"""What a benchmark finds out: one flat dict per measured case, and how a list of them reads as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Value = str | int | float | bool | None
Row = dict[str, Value]


def render_text(rows: Sequence[Row]) -> str:
    """Aligned columns, numbers to the right; for a terminal."""
    header, *body = _cells(rows)
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    numeric = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in header]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in (header, *body)
    ]
    return "\n".join(lines)


def render_markdown(rows: Sequence[Row]) -> str:
    header, *body = _cells(rows)
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """The header, then a line per row. Columns that no row fills are left out."""
    names = _column_names(rows)
    return [names, *([_cell(row.get(name)) for name in names] for row in rows)]


def _column_names(rows: Iterable[Row]) -> list[str]:
    """In order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name, value in row.items() if value is not None))


def _cell(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return str(value).replace("|", "/").replace("\n", " ")
