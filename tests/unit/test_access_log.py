"""A line for each request, or a summary, and never nothing."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from fake_clock import FakeClock
from log_records import fields_of, recorded

from cluster.front.access_log import MAX_LINES_PER_S, SUMMARY_PERIOD_S, AccessEntry, AccessLog
from cluster.front.generate_call import GRPC_GENERATE


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    with recorded("arriero.access") as records:
        yield records


def entry(request_id: str = "r", status: str = "OK", **values: Any) -> AccessEntry:
    fields: dict[str, Any] = {"num_prompt_tokens": 3, "num_cached_tokens": 0, "num_output_tokens": 5, "total_s": 1.0}
    fields |= {"first_token_s": 0.25, "finish_reasons": ("stop",), **values}
    return AccessEntry(origin=GRPC_GENERATE, request_id=request_id, status=status, **fields)


def test_a_line_tells_all_of_its_request(lines: list[logging.LogRecord], clock: FakeClock) -> None:
    AccessLog("auto", clock=clock).write(entry("r1", finish_reasons=("length", "stop"), num_cached_tokens=2))
    assert fields_of(lines[0]) == {
        "protocol": "grpc",
        "method": "Generate",
        "request_id": "r1",
        "status": "OK",
        "finish_reason": "length,stop",
        "prompt_tokens": 3,
        "cached_tokens": 2,
        "output_tokens": 5,
        "first_token_s": 0.25,
        "total_s": 1.0,
    }


def test_few_requests_get_a_line_each_however_many_they_become(
    lines: list[logging.LogRecord], clock: FakeClock
) -> None:
    log = AccessLog("auto", clock=clock)
    for _ in range(10 * MAX_LINES_PER_S):
        log.write(entry())
        clock.sleep(1.001 / MAX_LINES_PER_S)
    assert [record.getMessage() for record in lines] == ["request"] * (10 * MAX_LINES_PER_S)


def test_many_requests_get_a_summary_that_holds_each_of_them(lines: list[logging.LogRecord], clock: FakeClock) -> None:
    log = AccessLog("auto", clock=clock)
    for index in range(3 * MAX_LINES_PER_S):
        log.write(entry(status="UNAVAILABLE" if index % 2 else "OK", first_token_s=float(index)))
    assert [record.getMessage() for record in lines[MAX_LINES_PER_S:]] == [
        f"more than {MAX_LINES_PER_S} requests/s: from now on a summary every {SUMMARY_PERIOD_S:g} s"
    ]
    clock.sleep(SUMMARY_PERIOD_S)
    log.tick()
    assert fields_of(lines[MAX_LINES_PER_S + 1]) == {
        "period_s": SUMMARY_PERIOD_S,
        "requests": 2 * MAX_LINES_PER_S,
        "status_OK": MAX_LINES_PER_S,
        "status_UNAVAILABLE": MAX_LINES_PER_S,
        "prompt_tokens": 6 * MAX_LINES_PER_S,
        "output_tokens": 10 * MAX_LINES_PER_S,
        "median_first_token_s": 2.0 * MAX_LINES_PER_S,
        "max_first_token_s": 3.0 * MAX_LINES_PER_S - 1,
    }


def test_when_the_rush_is_over_each_request_has_its_line_again(
    lines: list[logging.LogRecord], clock: FakeClock
) -> None:
    log = AccessLog("auto", clock=clock)
    for _ in range(20 * MAX_LINES_PER_S):
        log.write(entry())
    for _ in range(2):
        clock.sleep(SUMMARY_PERIOD_S)
        log.tick()
    log.write(entry("late"))
    messages = [record.getMessage() for record in lines[MAX_LINES_PER_S + 1 :]]
    assert messages == ["requests", "requests", "fewer requests again: from now on a line for each", "request"]
    assert [fields_of(record)["requests"] for record in lines if record.getMessage() == "requests"] == [
        19 * MAX_LINES_PER_S,
        0,
    ]
    assert fields_of(lines[-1])["request_id"] == "late"


@pytest.mark.parametrize(("mode", "num_lines"), [("on", 100), ("off", 0)])
def test_on_is_always_and_off_is_never(
    mode: Any, num_lines: int, lines: list[logging.LogRecord], clock: FakeClock
) -> None:
    log = AccessLog(mode, clock=clock)
    for _ in range(100):
        log.write(entry())
    assert len(lines) == num_lines
