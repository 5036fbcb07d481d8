from __future__ import annotations

import pytest

from cluster.balance.busy_fraction import BusyFraction
from experts.placement import ShardId

A, B = ShardId("a"), ShardId("b")


def test_a_fraction_is_known_from_the_second_report_on() -> None:
    busy = BusyFraction(60.0)
    assert busy.of(A) is None
    busy.report(A, 1000.0, 5.0)
    assert busy.of(A) is None
    busy.report(A, 1001.0, 9.0)
    assert busy.of(A) == pytest.approx(0.25)


def test_what_is_older_than_the_window_is_forgotten() -> None:
    busy = BusyFraction(10.0)
    for second in range(41):
        busy.report(A, float(min(second, 20)), float(second))
        if second == 20:
            assert busy.of(A) == pytest.approx(1.0)
    assert busy.of(A) == pytest.approx(0.0)


def test_the_mean_is_known_once_every_shard_is() -> None:
    busy = BusyFraction(60.0)
    assert busy.mean is None
    busy.report(A, 0.0, 0.0)
    busy.report(A, 1.0, 2.0)
    busy.report(B, 0.0, 0.0)
    assert busy.mean is None
    busy.report(B, 0.2, 2.0)
    assert busy.mean == pytest.approx(0.3)
    busy.forget(A)
    assert busy.of(A) is None
    assert busy.mean == pytest.approx(0.1)


def test_a_window_must_have_a_length() -> None:
    with pytest.raises(ValueError, match="window_s must be positive, got -1"):
        BusyFraction(-1.0)
