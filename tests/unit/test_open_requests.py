"""What a gateway measures of its requests and says of them, with a clock that stands still between two acts."""

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from fake_clock import FakeClock
from log_records import fields_of, recorded

from cluster.front.access_log import AccessLog
from cluster.front.choice_text import ChoiceText
from cluster.front.detokenizer import NoDetokenizer
from cluster.front.errors import ServiceError, StatusCode
from cluster.front.generate_call import GRPC_GENERATE, GenerateCall, TokenPrompt
from cluster.front.journal import ChoiceJournal, ChoicePlan, Delta
from cluster.front.open_requests import MAX_REPORTED, OpenRequests
from cluster.front.request_observer import RequestObserver
from cluster.metrics import definitions as metrics
from cluster.metrics.snapshot import Snapshot
from router.messages import FinishReason, SequenceOutput
from router.sampling_params import SamplingParams

CALL = GenerateCall(prompt=TokenPrompt(token_ids=[1, 2, 3]), num_bytes=3, request_id="r")


@dataclass
class Router:
    router_id: str


ROUTER_A = Router(router_id="router-a")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def requests(clock: FakeClock) -> OpenRequests:
    return OpenRequests(access_log=AccessLog("on", clock=clock), slow_after_s=30.0, clock=clock)


@pytest.fixture
def access() -> Iterator[list[logging.LogRecord]]:
    with recorded("arriero.access") as records:
        yield records


@pytest.fixture
def warnings() -> Iterator[list[logging.LogRecord]]:
    with recorded("arriero.gateway", logging.WARNING) as records:
        yield records


def journals(num_choices: int = 1) -> list[ChoiceJournal]:
    return [
        ChoiceJournal(
            ChoicePlan(engine_id=f"r/n/{index}", prompt_ids=[1, 2, 3], params=_params(index)),
            ChoiceText(NoDetokenizer()),
        )
        for index in range(num_choices)
    ]


def _params(index: int) -> SamplingParams:
    return SamplingParams(choice_index=index, max_tokens=9)


def output(*token_ids: int, **values: Any) -> SequenceOutput:
    return SequenceOutput(request_id="r/n/0", attempt=0, token_ids=list(token_ids), **values)


def accept(observer: RequestObserver, num_choices: int = 1) -> None:
    """Through the checks, and given to a router."""
    observer.accepted("r", 3, journals(num_choices))
    for choice in observer.choices:
        choice.journal.submit("gateway:1")
        choice.progress.submitted(0, ROUTER_A)


def send(observer: RequestObserver, *token_ids: int, choice_index: int = 0, end: FinishReason | None = None) -> None:
    """From the router through the journal to the client."""
    news = output(*token_ids, finish_reason=end)
    observer.choices[choice_index].progress.heard(news)
    observer.choices[choice_index].journal.accept(news)
    observer.sending(Delta(choice_index=choice_index, token_ids=token_ids, finish_reason=end))


def histogram(requests: OpenRequests, metric: metrics.Metric) -> tuple[int, float]:
    """(observations, their sum)."""
    found = requests.report().metrics.histograms[metric.name]
    return sum(found.counts), found.total


def counters(snapshot: Snapshot) -> dict[str, float]:
    """Those that are not zero, labels after the name."""
    return {
        " ".join([name, *labels]): value
        for name, series in snapshot.numbers.items()
        for labels, value in series.items()
        if value
    }


def test_times_are_of_the_first_token_and_then_of_each(requests: OpenRequests, clock: FakeClock) -> None:
    with requests.observe(CALL) as observer:
        clock.sleep(0.5)
        accept(observer)
        clock.sleep(1.5)
        send(observer, 7)
        clock.sleep(0.3)
        send(observer, 8, 9, 10)
        clock.sleep(0.4)
        send(observer, 11, end=FinishReason.LENGTH)
        clock.sleep(0.1)
    assert histogram(requests, metrics.TIME_TO_FIRST_TOKEN) == (1, pytest.approx(2.0))
    assert histogram(requests, metrics.INTER_TOKEN_LATENCY) == (4, pytest.approx(0.7))
    assert histogram(requests, metrics.REQUEST_LATENCY) == (1, pytest.approx(2.8))
    assert histogram(requests, metrics.REQUEST_PROMPT_TOKENS) == (1, 3)
    assert histogram(requests, metrics.REQUEST_GENERATION_TOKENS) == (1, 5)
    # Of three tokens after 0.3 s each took a third of that.
    per_token = requests.report().metrics.histograms[metrics.INTER_TOKEN_LATENCY.name].counts
    at = metrics.INTER_TOKEN_LATENCY.buckets.index
    assert (per_token[at(0.1)], per_token[at(0.4)]) == (3, 1)


def test_tokens_that_come_first_and_together_were_not_waited_for_one_by_one(requests: OpenRequests) -> None:
    with requests.observe(CALL) as observer:
        accept(observer)
        send(observer, 7, 8, 9, end=FinishReason.STOP)
    assert histogram(requests, metrics.INTER_TOKEN_LATENCY) == (2, 0.0)


def test_choices_are_counted_each_and_their_prompt_once(requests: OpenRequests, clock: FakeClock) -> None:
    with requests.observe(CALL) as observer:
        accept(observer, 2)
        clock.sleep(1.0)
        send(observer, 7, choice_index=1, end=FinishReason.STOP)
        clock.sleep(1.0)
        send(observer, 7, 8, end=FinishReason.LENGTH)
    assert counters(requests.report().metrics) == {
        "vllm:prompt_tokens": 3,
        "vllm:generation_tokens": 3,
        "vllm:request_success stop": 1,
        "vllm:request_success length": 1,
    }
    assert histogram(requests, metrics.TIME_TO_FIRST_TOKEN) == (1, pytest.approx(1.0))
    assert histogram(requests, metrics.REQUEST_GENERATION_TOKENS) == (2, 3)


def test_queue_time_ends_where_the_first_step_begins_and_is_counted_once(
    requests: OpenRequests, clock: FakeClock
) -> None:
    with requests.observe(CALL) as observer:
        accept(observer)
        progress = observer.choices[0].progress
        clock.sleep(2.0)
        progress.submitted(1, ROUTER_A)
        clock.sleep(3.0)
        progress.heard(output(since_begin_s=0.75))
        progress.heard(output(7))
        progress.submitted(2, ROUTER_A)
        progress.heard(output(8, since_begin_s=0.1))
    assert histogram(requests, metrics.REQUEST_QUEUE_TIME) == (1, pytest.approx(4.25))
    assert counters(requests.report().metrics)["arriero:resubmissions"] == 2


def test_an_open_choice_is_told_with_its_router_and_phase(requests: OpenRequests, clock: FakeClock) -> None:
    with requests.observe(CALL) as observer:
        assert requests.report().open_choices == ()
        accept(observer)
        seen = [requests.report().open_choices[0]]
        progress = observer.choices[0].progress
        clock.sleep(1.0)
        progress.heard(output(since_begin_s=0.1))
        seen.append(requests.report().open_choices[0])
        clock.sleep(2.0)
        send(observer, 7, 8)
        clock.sleep(4.0)
        seen.append(requests.report().open_choices[0])
        progress.submitted(1, Router(router_id=""))
        seen.append(requests.report().open_choices[0])
        assert requests.report().num_open_choices == 1
        assert counters(requests.report().metrics)["arriero:open_choices"] == 1
    assert [(each.phase, each.router_id, each.attempt) for each in seen] == [
        ("queued", "router-a", 0),
        ("prefill", "router-a", 0),
        ("decoding", "router-a", 0),
        ("queued", "", 1),
    ]
    assert (seen[2].age_s, seen[2].idle_s, seen[2].num_completion_tokens) == (7.0, 4.0, 2)
    assert requests.report().open_choices == ()
    assert requests.report().num_open_choices == 0


def test_the_oldest_choices_are_reported_and_all_are_counted(requests: OpenRequests, clock: FakeClock) -> None:
    for _ in range(MAX_REPORTED):
        accept(requests.observe(CALL).__enter__(), 2)
        clock.sleep(1.0)
    report = requests.report()
    assert report.num_open_choices == 2 * MAX_REPORTED
    assert len(report.open_choices) == MAX_REPORTED
    assert min(each.age_s for each in report.open_choices) == MAX_REPORTED / 2 + 1


ENDINGS: list[tuple[BaseException, str, dict[str, float]]] = [
    (ServiceError(StatusCode.UNAVAILABLE, "no"), "UNAVAILABLE", {"arriero:request_errors UNAVAILABLE": 1}),
    (asyncio.CancelledError(), "CANCELLED", {"vllm:request_success abort": 1}),
    (GeneratorExit(), "CANCELLED", {"vllm:request_success abort": 1}),
    (KeyError("a secret"), "INTERNAL", {"arriero:request_errors INTERNAL": 1}),
]


@pytest.mark.parametrize(("error", "status", "counted"), ENDINGS)
def test_a_request_that_does_not_come_to_its_end_is_counted_by_why(
    requests: OpenRequests,
    access: list[logging.LogRecord],
    warnings: list[logging.LogRecord],
    error: BaseException,
    status: str,
    counted: dict[str, float],
) -> None:
    def work() -> None:
        with requests.observe(CALL) as observer:
            accept(observer, 2)
            send(observer, 7, choice_index=1, end=FinishReason.STOP)
            raise error

    with pytest.raises(ServiceError if isinstance(error, Exception) else type(error), match=r"^(no|internal error|)$"):
        work()
    assert counters(requests.report().metrics) == {
        "vllm:prompt_tokens": 3,
        "vllm:generation_tokens": 1,
        "vllm:request_success stop": 1,
        **counted,
    }
    assert histogram(requests, metrics.REQUEST_LATENCY) == (0, 0.0)
    [line] = access
    assert (fields_of(line)["status"], fields_of(line)["output_tokens"]) == (status, 1)
    assert requests.report().num_open_choices == 0
    # A stack trace, once, for what nobody expects, and for nothing else.
    assert [record.exc_info is not None for record in warnings] == ([True] if status == "INTERNAL" else [])


def test_a_client_that_leaves_with_the_last_message_was_answered(
    requests: OpenRequests, access: list[logging.LogRecord]
) -> None:
    def leave() -> None:
        with requests.observe(CALL) as observer:
            accept(observer)
            send(observer, 7, end=FinishReason.STOP)
            raise GeneratorExit

    with pytest.raises(GeneratorExit):
        leave()
    assert fields_of(access[0])["status"] == "OK"
    assert histogram(requests, metrics.REQUEST_LATENCY)[0] == 1


def test_a_choice_whose_end_the_client_had_seen_before_is_no_abort(requests: OpenRequests) -> None:
    def leave() -> None:
        with requests.observe(CALL) as observer:
            plan = ChoicePlan(engine_id="r/n/1", prompt_ids=[1, 2, 3], params=_params(1), already_finished=True)
            seen = ChoiceJournal(plan, ChoiceText(NoDetokenizer()))
            observer.accepted("r", 3, [*journals(), seen])
            raise GeneratorExit

    with pytest.raises(GeneratorExit):
        leave()
    assert counters(requests.report().metrics) == {"vllm:request_success abort": 1}


def test_what_never_became_a_call_is_counted_and_logged(
    requests: OpenRequests, access: list[logging.LogRecord]
) -> None:
    requests.refuse(GRPC_GENERATE, ServiceError(StatusCode.INVALID_ARGUMENT, "prompt must be set"))
    assert counters(requests.report().metrics) == {"arriero:request_errors INVALID_ARGUMENT": 1}
    assert fields_of(access[0])["status"] == "INVALID_ARGUMENT"


def test_a_request_that_stands_still_is_named_once_for_each_doubling(
    requests: OpenRequests, clock: FakeClock, warnings: list[logging.LogRecord]
) -> None:
    times = []
    with requests.observe(CALL) as observer:
        accept(observer, 2)
        send(observer, 7, choice_index=1)
        for second in range(1, 200):
            clock.sleep(1.0)
            send(observer, 8)
            requests.tick()
            if len(warnings) > len(times):
                times.append(second)
    assert times == [30, 60, 120]
    assert [record.getMessage() for record in warnings] == [f"no progress for {time} s" for time in times]
    assert fields_of(warnings[0]) == {
        "request_id": "r",
        "choice": 1,
        "open_choices": 2,
        "phase": "decoding",
        "router": "router-a",
        "attempt": 0,
        "age_s": 30.0,
        "prompt_tokens": 3,
        "output_tokens": 1,
    }


def test_a_request_that_moves_or_whose_choices_have_ended_is_not_named(
    requests: OpenRequests, clock: FakeClock, warnings: list[logging.LogRecord]
) -> None:
    with requests.observe(CALL), requests.observe(CALL) as moving, requests.observe(CALL) as ended:
        accept(moving)
        accept(ended)
        send(ended, 7, end=FinishReason.STOP)
        for _ in range(100):
            clock.sleep(29.0)
            send(moving, 8)
            requests.tick()
    assert warnings == []


def test_nothing_is_slow_where_nobody_wants_to_know(clock: FakeClock, warnings: list[logging.LogRecord]) -> None:
    requests = OpenRequests(slow_after_s=0.0, clock=clock)
    with requests.observe(CALL) as observer:
        accept(observer)
        clock.sleep(1e6)
        requests.tick()
    assert warnings == []
