from __future__ import annotations

import pytest

from router.epoch_pause import EpochPause, EpochPauseMeter


def meter(*steps_s: float) -> EpochPauseMeter:
    meter = EpochPauseMeter()
    for step_s in steps_s:
        assert meter.step_ended(10.0, 10.0 + step_s) is None
    return meter


def test_a_pause_is_what_the_first_step_takes_longer_from_the_commit_on() -> None:
    steps = meter(0.25, 0.5, 4.0)
    steps.epoch_adopted(7, 20.0)
    pause = steps.step_ended(21.0, 22.0)
    assert pause == EpochPause(epoch=7, first_step_s=2.0, median_step_s=0.5)
    assert pause.pause_s == 1.5
    assert steps.step_ended(22.0, 23.0) is None, "only the first step of an epoch"


def test_a_first_step_that_is_short_is_no_negative_pause() -> None:
    steps = meter(1.0)
    steps.epoch_adopted(7, 20.0)
    pause = steps.step_ended(20.0, 20.5)
    assert pause is not None
    assert pause.pause_s == 0.0


def test_the_median_is_of_steps_before_the_commit() -> None:
    steps = meter(1.0)
    for number in (7, 8):
        steps.epoch_adopted(number, 20.0)
        pause = steps.step_ended(20.0, 25.0)
    assert pause == EpochPause(epoch=8, first_step_s=5.0, median_step_s=pytest.approx(3.0))


def test_who_has_nothing_to_do_is_not_held_up() -> None:
    idle = meter()
    idle.epoch_adopted(7, 20.0)
    assert idle.step_ended(30.0, 31.0) is None
    resting = meter(1.0)
    resting.epoch_adopted(7, 20.0)
    resting.rests()
    assert resting.step_ended(30.0, 31.0) is None
    resting.epoch_adopted(8, 31.0)
    assert resting.step_ended(31.0, 33.0) == EpochPause(epoch=8, first_step_s=2.0, median_step_s=1.0)
