from __future__ import annotations

import random
from dataclasses import replace

import pytest
from chaos import invariants, scenario
from chaos.arena import Outcome
from chaos.load import draw_asks
from chaos.record import Injury, StreamRecord
from chaos.report import quantile, table
from chaos.scenario import LONG, SHORT, Cut, Kill, Stop
from chaos.view import MemberView, View
from holdings import Holdings

from cluster.control.membership import MemberKind, MemberState

MIB = 2**20
REFERENCE = [[1, 2, 3], [4, 5]]


def stream(ask: int = 0, **changes: object) -> StreamRecord:
    """In order, if nothing is changed: a message each second from second 11 on."""
    values: dict[str, object] = {
        "request_id": f"r{ask}",
        "ask": ask,
        "opened_s": 10.0,
        "token_ids": list(REFERENCE[ask]),
        "arrivals_s": [11.0, 12.0, 13.0],
        "num_finishes": 1,
        "ended_s": 13.5,
    }
    return StreamRecord(**(values | changes))  # type: ignore[arg-type]


def test_streams_that_end_once_with_the_wanted_tokens_break_nothing() -> None:
    records = [stream(0), stream(1)]
    assert invariants.lost(records) == []
    assert invariants.wrong(records, REFERENCE) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"error": "UNAVAILABLE: gone"}, "r0: UNAVAILABLE: gone"),
        ({"num_finishes": 0}, "r0: 0 ends after 3 tokens"),
        ({"num_finishes": 2}, "r0: 2 ends after 3 tokens"),
    ],
)
def test_a_stream_that_does_not_end_exactly_once_is_lost(changes: dict[str, object], sentence: str) -> None:
    record = stream(0, **changes)
    assert invariants.lost([record, stream(1)]) == [sentence]
    assert invariants.wrong([record], REFERENCE) == []


def test_a_request_that_was_recorded_twice_is_named() -> None:
    assert invariants.lost([stream(0), stream(0)]) == ["r0: recorded twice"]


@pytest.mark.parametrize(
    ("token_ids", "sentence"),
    [
        ([1, 9, 3], "from token 1 on: 3 tokens, 3 wanted"),
        ([1, 2], "from token 2 on: 2 tokens, 3 wanted"),
        ([1, 2, 3, 3], "from token 3 on: 4 tokens, 3 wanted"),
    ],
)
def test_other_tokens_are_wrong_and_the_first_difference_is_told(token_ids: list[int], sentence: str) -> None:
    [found] = invariants.wrong([stream(0, token_ids=token_ids)], REFERENCE)
    assert found.endswith(sentence)


def test_degraded_tokens_are_wrong_even_if_they_are_the_same() -> None:
    assert invariants.wrong([stream(0, is_degraded=True)], REFERENCE) == ["r0 (ask 0): degraded"]


def test_an_undisturbed_run_that_differs_from_itself_is_no_reference() -> None:
    assert invariants.not_reproducible(REFERENCE, REFERENCE) == []
    [found] = invariants.not_reproducible(REFERENCE, [[1, 2, 3], [4, 6]])
    assert found.startswith("ask 1: differs from token 1")


@pytest.mark.parametrize(
    ("from_s", "until_s", "pause_s"),
    [
        (12.5, 14.0, 7.0),  # begins within
        (15.0, 16.0, 7.0),  # lasts all the time
        (19.0, 30.0, 7.0),  # ends within
        (20.0, 30.0, 0.5),  # over
        (9.0, 10.5, 1.0),  # the wait for the first message
        (9.0, 10.0, 0.0),
    ],
)
def test_a_pause_counts_if_any_of_it_falls_into_the_time_of_the_fault(
    from_s: float, until_s: float, pause_s: float
) -> None:
    record = stream(0, arrivals_s=[11.0, 12.0, 13.0, 20.0], ended_s=20.5)
    assert invariants.longest_pause_s(record, from_s, until_s) == pause_s


def test_a_stream_has_moved_on_with_a_later_message_or_its_end() -> None:
    unfinished = stream(0, ended_s=None)
    assert [unfinished.moved_on_since(at_s) for at_s in (12.9, 13.0)] == [True, False]
    assert stream(0).moved_on_since(20.0)


def test_whoever_was_not_meant_must_still_be_the_same_process() -> None:
    before = {"shard-0": 10, "shard-1": 11, "router-a": 12}
    assert invariants.hurt_bystanders(before, {"shard-2": 20, "shard-1": 11, "router-a": 12}, {"shard-0"}) == []
    found = invariants.hurt_bystanders(before, {"shard-2": 20, "shard-1": 11, "router-a": 13}, {"shard-2"})
    assert found == ["shard-0: process 10 has become None", "router-a: process 12 has become 13"]


HELD = Holdings(num_fds=100, num_sockets=50, memory_bytes=400 * MIB)


@pytest.mark.parametrize(
    ("now", "sentences"),
    [
        (HELD, []),
        (replace(HELD, num_fds=104, memory_bytes=450 * MIB), []),
        (replace(HELD, num_fds=105), ["gateway-1: 105 descriptors, 100 before"]),
        (replace(HELD, memory_bytes=460 * MIB), ["gateway-1: 460 MiB, 400 MiB before"]),
    ],
)
def test_what_a_process_holds_more_than_before_is_told(now: Holdings, sentences: list[str]) -> None:
    assert invariants.not_given_back({"gateway-1": HELD}, {"gateway-1": now}) == sentences


def test_a_process_that_came_later_is_measured_by_those_of_its_kind() -> None:
    before = {"router-a": replace(HELD, num_fds=10), "router-b": HELD, "router-a (replica)": replace(HELD, num_fds=500)}
    after = {"router-c": replace(HELD, num_fds=110), "router-c (replica)": replace(HELD, num_fds=110)}
    assert invariants.not_given_back(before, after) == ["router-c: 110 descriptors, 100 before"]


def member(
    member_id: str, state: MemberState = MemberState.READY, slots: tuple[tuple[int, int], ...] = ()
) -> MemberView:
    return MemberView(member_id=member_id, kind=MemberKind.SHARD, pid=1, state=state, slots=slots)


def test_a_view_has_its_old_shape_again_when_a_replacement_has_what_was_lost() -> None:
    whole = View((member("shard-0", slots=((0, 1),)), member("shard-1", slots=((0, 1), (0, 2)))))
    replaced = View((member("shard-9", slots=((0, 2), (0, 1))), member("shard-1", slots=((0, 1),))))
    dead = member("shard-0", MemberState.DEAD, ((0, 1),))
    assert View((*replaced.members, dead)).shape == whole.shape
    for other in (
        View((*replaced.members, member("shard-3", MemberState.STARTING))),
        View((member("shard-9", slots=((0, 2), (0, 1))), member("shard-1"))),
        View((member("shard-9", MemberState.SUSPECT, ((0, 2), (0, 1))), member("shard-1", slots=((0, 1),)))),
    ):
        assert other.shape != whole.shape


def test_clients_try_again_only_where_their_own_call_breaks() -> None:
    resumed = {each.name for each in LONG if each.clients_resume}
    assert resumed == {"kill-gateway", "cut-clients"}
    assert {type(each.fault) for each in SHORT} == {Kill, Stop, Cut}
    assert len({each.name for each in LONG}) == len(LONG)


def test_the_same_seed_draws_the_same_asks() -> None:
    first, second, other = (draw_asks(5, 100, random.Random(seed)) for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_quantiles_are_values_that_were_measured() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [quantile(values, q) for q in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert quantile([3.0], 0.99) == 3.0


def test_the_table_counts_faults_and_what_they_hit() -> None:
    injury = Injury(
        scenario="kill-shard",
        victims=("shard-1",),
        at_s=1.0,
        healed_s=3.0,
        hit=("a", "b"),
        num_open=4,
        longest_pause_s=0.5,
    )
    outcome = Outcome(
        scenario=scenario.kill(MemberKind.SHARD), injuries=[injury, replace(injury, longest_pause_s=1.5)], num_streams=9
    )
    outcome.lost.append("a: gone")
    line = table([outcome, Outcome(scenario=scenario.cut())]).splitlines()[1]
    assert line.split() == ["kill-shard", "2", "4", "0.50", "s", "1.50", "s", "1.50", "s", "2.0", "s", "9", "1", "0"]
