"""Which experts served which task, as a picture for a terminal. Pure: counts in, a table out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

# (decoder layer, expert) -> rows that the expert computed.
ExpertCounts = Mapping[tuple[int, int], int]

SHADES = " ░▒▓█"
COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")


def picture(counts_of_task: Mapping[str, ExpertCounts], shard_of: Mapping[tuple[int, int], str]) -> Table:
    """A row per layer and task, a column per expert: the darker, the larger the expert's share of that row's tokens.

    shard_of: (layer, expert) -> shard; each shard has a colour, named in the caption. Every slot of the counts must be
    in it.
    """
    colour_of = {shard: COLOURS[index % len(COLOURS)] for index, shard in enumerate(sorted(set(shard_of.values())))}
    layers = sorted({layer for layer, _ in shard_of})
    experts = sorted({expert for _, expert in shard_of})
    table = Table(
        box=None, padding=(0, 1, 0, 0), caption=_caption(colour_of), caption_justify="left", title_justify="left"
    )
    for heading in ("layer", "task", *(str(expert) for expert in experts), "busiest"):
        table.add_column(heading, justify="left" if heading in ("task", "busiest") else "right", no_wrap=True)
    for layer in layers:
        for task, counts in counts_of_task.items():
            row = [counts.get((layer, expert), 0) for expert in experts]
            colours = [colour_of[shard_of[layer, expert]] for expert in experts]
            table.add_row(str(layer), task, *_shaded(row, colours), _busiest(experts, row))
    return table


def _shaded(counts: Sequence[int], colours: Sequence[str]) -> list[Text]:
    """Two characters per count. The palest shade is for any share at all, the blank for none."""
    most = max(counts, default=0)
    last = len(SHADES) - 1
    shades = [0 if count == 0 else 1 + (count * (last - 1)) // most for count in counts]
    return [Text(2 * SHADES[shade], style=colour) for shade, colour in zip(shades, colours, strict=True)]


def _busiest(experts: Sequence[int], counts: Sequence[int]) -> str:
    total = sum(counts)
    if total == 0:
        return "nothing"
    most = max(range(len(counts)), key=lambda index: counts[index])
    return f"expert {experts[most]}: {100 * counts[most] / total:.0f}%"


def _caption(colour_of: Mapping[str, str]) -> Text:
    return Text("  ").join(Text(shard, style=colour) for shard, colour in colour_of.items())
