"""The open-loop load: when requests leave, what is made of what comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

from cluster.bench.arrivals import poisson_arrivals
from cluster.bench.open_loop import Ask, AskFailedError, run_open_loop
from cluster.bench.serve_command import rates
from cluster.bench.stream_timing import Goal, StreamTiming, summarize

GOAL = Goal(time_to_first_s=0.5, time_per_token_s=0.1)


def test_arrivals_have_the_mean_and_the_spread_of_a_poisson_process() -> None:
    times = poisson_arrivals(rate=4.0, count=20_000, seed=1)
    gaps = [later - earlier for earlier, later in pairwise([0.0, *times])]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert min(gaps) > 0
    assert mean == pytest.approx(1 / 4, rel=0.03)
    assert variance**0.5 == pytest.approx(1 / 4, rel=0.03)
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.02)


def test_arrivals_are_a_function_of_the_seed() -> None:
    assert poisson_arrivals(rate=1.0, count=5, seed=1) == poisson_arrivals(rate=1.0, count=5, seed=1)
    assert poisson_arrivals(rate=1.0, count=5, seed=1) != poisson_arrivals(rate=1.0, count=5, seed=2)


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_a_rate_that_is_not_positive_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="rate must be positive"):
        poisson_arrivals(rate=rate, count=1, seed=0)
    with pytest.raises(Exception, match="must be positive numbers"):
        rates(f"1,{rate}")


def timing(*messages: tuple[float, int], due_s: float = 10.0, error: str | None = None) -> StreamTiming:
    return StreamTiming(due_s=due_s, sent_s=due_s + 0.001, messages=list(messages), error=error)


def test_time_to_first_token_runs_from_when_the_request_was_due() -> None:
    assert timing((10.25, 1)).time_to_first_s == 0.25


def test_time_per_token_counts_tokens_and_not_messages() -> None:
    # Nine more tokens in 1.8 s, in two messages.
    answer = timing((11.0, 1), (11.5, 4), (12.8, 5))
    assert answer.time_per_token_s == pytest.approx(0.2)
    assert answer.longest_gap_s == pytest.approx(1.3)
    assert timing((11.0, 3)).time_per_token_s is None
    assert timing((11.0, 3)).longest_gap_s == 0.0


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        (timing((10.4, 1), (10.9, 10)), True),
        (timing((10.6, 1), (10.9, 10)), False),
        (timing((10.4, 1), (11.9, 10)), False),
        (timing((10.4, 1)), True),
        (timing((10.4, 1), (10.9, 10), error="broke off"), False),
        (timing(), False),
    ],
)
def test_a_good_answer_meets_both_limits_and_is_whole(answer: StreamTiming, good: bool) -> None:
    assert GOAL.is_met(answer) is good


def test_a_row_counts_errors_and_rates_over_the_whole_run() -> None:
    answers = [
        timing((10.4, 1), (11.0, 9)),
        timing((13.0, 1), (14.0, 9), due_s=12.0),
        timing((13.0, 4), due_s=12.0, error="UNAVAILABLE: gone"),
    ]
    row = summarize(answers, GOAL)
    assert (row["requests"], row["errors"], row["num_samples"]) == (3, 1, 2)
    assert row["duration_s"] == 4.0
    assert row["requests_per_s"] == 0.5
    assert row["goodput_per_s"] == 0.25
    assert row["tokens_per_s"] == 6.0
    assert row["ttft_p50_ms"] == 700.0
    assert row["late_p99_ms"] == pytest.approx(1.0)
    assert row["first_error"] == "UNAVAILABLE: gone"


def test_a_run_without_an_answer_is_a_row_of_errors() -> None:
    row = summarize([timing(error="refused")], GOAL)
    assert (row["errors"], row["num_samples"]) == (1, 0)
    assert "ttft_p50_ms" not in row


class Answers:
    """Brings each ask's tokens one by one, once it is let; fails or falls silent for some lengths."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.may_answer = asyncio.Event()

    async def answer(self, ask: Ask) -> AsyncIterator[int]:
        self.asked.append(ask.max_tokens)
        await self.may_answer.wait()
        if ask.max_tokens == 13:
            raise AskFailedError("bad luck")
        if ask.max_tokens == 99:
            await asyncio.Event().wait()
        for _ in range(min(ask.max_tokens, 5)):
            yield 1

    async def close(self) -> None:
        pass


async def ask_all(*lengths: int, arrivals: list[float] | None = None, timeout_s: float = 30.0) -> list[StreamTiming]:
    client = Answers()

    async def let() -> None:
        while len(client.asked) < len(lengths):
            await asyncio.sleep(0.001)
        client.may_answer.set()

    asks = [Ask(prompt_ids=(1,), max_tokens=length) for length in lengths]
    load = run_open_loop(client, asks, arrivals or [0.0] * len(asks), timeout_s=timeout_s)
    timings, _ = await asyncio.gather(load, let())
    return timings


def test_requests_leave_whatever_has_become_of_those_before() -> None:
    # No answer comes before all have been asked: a closed loop would never end.
    timings = asyncio.run(ask_all(1, 2, 3))
    assert [each.num_tokens for each in timings] == [1, 2, 3]
    assert [each.error for each in timings] == [None] * 3


def test_requests_leave_no_sooner_than_they_are_due() -> None:
    timings = asyncio.run(ask_all(1, 1, arrivals=[0.05, 0.1]))
    assert all(each.sent_s >= each.due_s for each in timings)
    assert timings[1].due_s - timings[0].due_s == pytest.approx(0.05)


def test_a_failure_a_silence_and_a_short_answer_are_errors_of_their_own() -> None:
    failed, silent, short, whole = asyncio.run(ask_all(13, 99, 7, 5, timeout_s=0.5))
    assert failed.error == "bad luck"
    assert silent.error == "no whole answer within 0.5 s"
    assert short.error == "5 tokens came, 7 were asked for"
    assert whole.error is None
