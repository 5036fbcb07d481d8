from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from experts.transport.row_space import RowSpace

NUM_ROWS = 40


def test_the_lowest_run_that_fits_is_taken() -> None:
    space = RowSpace(10)
    assert [space.take(3), space.take(2), space.take(4)] == [0, 3, 5]
    space.give_back(0)
    space.give_back(5)
    assert [space.take(4), space.take(2), space.take(1)] == [5, 0, 2]


def test_what_does_not_fit_is_not_taken_and_fits_later() -> None:
    space = RowSpace(10)
    first = space.take(6)
    assert first == 0
    assert space.take(5) is None
    assert space.take(4) == 6
    space.give_back(first)
    assert space.take(6) == 0


def test_the_end_is_behind_the_last_row_in_use() -> None:
    space = RowSpace(10)
    assert space.end == 0
    space.take(3)
    space.take(2)
    assert space.end == 5
    space.give_back(0)
    assert space.end == 5
    space.give_back(3)
    assert space.end == 0


class RowSpaceMachine(RuleBasedStateMachine):
    """Against a plain list of which row is whose."""

    def __init__(self) -> None:
        super().__init__()
        self.space = RowSpace(NUM_ROWS)
        self.owner: list[int | None] = [None] * NUM_ROWS

    @rule(num_rows=st.integers(1, NUM_ROWS + 2))
    def take(self, num_rows: int) -> None:
        free = [
            start
            for start in range(NUM_ROWS - num_rows + 1)
            if all(owner is None for owner in self.owner[start : start + num_rows])
        ]
        start = self.space.take(num_rows)
        assert start == (free[0] if free else None)
        if start is not None:
            self.owner[start : start + num_rows] = [start] * num_rows

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        starts = sorted({owner for owner in self.owner if owner is not None})
        if starts:
            start = data.draw(st.sampled_from(starts))
            self.space.give_back(start)
            self.owner = [None if owner == start else owner for owner in self.owner]

    @invariant()
    def end_is_behind_the_last_row(self) -> None:
        used = [row for row, owner in enumerate(self.owner) if owner is not None]
        assert self.space.end == (used[-1] + 1 if used else 0)


TestRowSpaceMachine = RowSpaceMachine.TestCase
