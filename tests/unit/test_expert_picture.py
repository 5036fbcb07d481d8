"""The picture of which experts served which task."""

from __future__ import annotations

import io

from rich.console import Console

from cluster.expert_picture import picture

SHARD_OF = {(layer, expert): f"shard-{expert % 2}" for layer in (1, 3) for expert in range(4)}


def drawn(counts_of_task: dict[str, dict[tuple[int, int], int]]) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    console.print(picture(counts_of_task, SHARD_OF))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_a_row_shows_shares_of_its_own_tokens() -> None:
    counts = {(1, 0): 1, (1, 1): 30, (1, 2): 100, (3, 3): 5}
    _heading, first, second, _shards = drawn({"sort": counts})
    assert first.split() == ["1", "sort", "░░", "░░", "██", "expert", "2:", "76%"]
    assert second.split() == ["3", "sort", "██", "expert", "3:", "100%"]


def test_each_layer_has_a_row_per_task_and_each_shard_is_named() -> None:
    lines = drawn({"sort": {(1, 0): 4}, "add": {}})
    assert [line.split()[:2] for line in lines[1:-1]] == [["1", "sort"], ["1", "add"], ["3", "sort"], ["3", "add"]]
    assert lines[2].endswith("nothing")
    assert lines[-1].split() == ["shard-0", "shard-1"]


def test_sixteen_experts_fit_into_a_terminal_of_eighty_columns() -> None:
    shard_of = {(layer, expert): "shard-0" for layer in (0, 1) for expert in range(16)}
    console = Console(file=io.StringIO(), width=80)
    console.print(picture({"reverse": {(0, 15): 3, (1, 11): 1}}, shard_of))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\u2026" not in text
    assert "expert 15: 100%" in text
