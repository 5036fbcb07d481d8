"""What the controller keeps of its members' reports."""

from typing import Any

from cluster.control.member_report import MemberReport, OpenChoice
from cluster.control.membership import MemberId
from cluster.control.report_book import ReportBook
from cluster.metrics.definitions import ENGINE_STEPS, REQUESTS_RUNNING
from cluster.metrics.merge import merge
from cluster.metrics.snapshot import Snapshot

A, B = MemberId("gateway-a"), MemberId("gateway-b")


def report(num_steps: int) -> MemberReport:
    metrics = Snapshot()
    metrics.put(ENGINE_STEPS, num_steps)
    metrics.put(REQUESTS_RUNNING, 1)
    return MemberReport(metrics=metrics)


def choice(request_id: str, age_s: float) -> OpenChoice:
    values: dict[str, Any] = {"choice_index": 0, "router_id": "", "attempt": 0, "phase": "queued", "idle_s": 0.5}
    return OpenChoice(request_id=request_id, age_s=age_s, num_prompt_tokens=1, num_completion_tokens=0, **values)


def num_steps(book: ReportBook) -> float:
    return merge(book.numbers()).numbers[ENGINE_STEPS.name][()]


def test_a_report_replaces_the_one_before_and_counts_beyond_its_members_life() -> None:
    book = ReportBook(Snapshot())
    book.take(A, report(3), 0.0)
    book.take(B, report(10), 0.0)
    book.take(A, report(5), 1.0)
    assert num_steps(book) == 15
    assert book.close(A)
    assert not book.close(A), "who has gone cannot go again"
    assert num_steps(book) == 15
    assert merge(book.numbers()).numbers[REQUESTS_RUNNING.name] == {(B,): 1}


def test_a_book_goes_on_from_what_an_earlier_one_has_noted() -> None:
    first = ReportBook(Snapshot())
    first.take(A, report(3), 0.0)
    first.close(A)
    second = ReportBook(first.departed)
    second.take(B, report(4), 0.0)
    assert num_steps(second) == 7


def test_open_choices_come_oldest_first_as_old_as_they_are_now() -> None:
    book = ReportBook(Snapshot())
    book.take(A, MemberReport(open_choices=(choice("a1", 9.0), choice("a2", 2.0)), num_open_choices=7), 100.0)
    book.take(B, MemberReport(open_choices=(choice("b1", 5.0),), num_open_choices=1), 101.0)
    num_open, oldest = book.open_choices(102.0, at_most=2)
    assert num_open == 8
    assert [(who, each.request_id, each.age_s, each.idle_s) for who, each in oldest] == [
        (A, "a1", 11.0, 2.5),
        (B, "b1", 6.0, 1.5),
    ]
