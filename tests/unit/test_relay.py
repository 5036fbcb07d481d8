"""The relay against scripted routers: real journals, real streams, no network."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from log_records import fields_of, recorded
from scripted_routers import NUM_TOKENS, STOPPED, Attempt, ScriptedRouters, serve_two_then_die, serve_whole

from cluster.front.choice_text import ChoiceText
from cluster.front.detokenizer import NoDetokenizer
from cluster.front.errors import ServiceError, StatusCode
from cluster.front.journal import ChoiceJournal, ChoicePlan, Delta
from cluster.front.relay import CallEnd, QueueFullError, Relay, RelayLimits, RouterLostError
from router.messages import ErrorCode, FinishReason
from router.sampling_params import SamplingParams

LIMITS = RelayLimits(stream_interval_s=0.0, resubmit_timeout_s=5.0)


def journal(choice_index: int = 0, **plan: Any) -> ChoiceJournal:
    params = SamplingParams(seed=1, choice_index=choice_index, max_tokens=NUM_TOKENS)
    made = ChoicePlan(engine_id=f"r/{choice_index}", prompt_ids=[1], params=params, **plan)
    return ChoiceJournal(made, ChoiceText(NoDetokenizer()))


def run(act: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(20):
            return await act

    return asyncio.run(bounded())


async def collect(relay: Relay) -> list[Delta]:
    return [delta async for batch in relay.batches() for delta in batch]


def relay_of(routers: ScriptedRouters, *journals: ChoiceJournal, limits: RelayLimits = LIMITS) -> Relay:
    return Relay(journals or (journal(),), routers=routers, tokens=routers, limits=limits)


def token_ids(deltas: list[Delta], choice_index: int = 0) -> list[int]:
    return [token_id for delta in deltas if delta.choice_index == choice_index for token_id in delta.token_ids]


async def refuse_full(attempt: Attempt) -> CallEnd:
    raise QueueFullError


def test_a_choice_comes_whole_and_ends_once() -> None:
    routers = ScriptedRouters([serve_whole])
    deltas = run(collect(relay_of(routers)))
    assert token_ids(deltas) == list(range(NUM_TOKENS))
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [FinishReason.LENGTH]
    assert routers.streams == {}


def test_every_router_that_dies_is_replaced_and_no_token_is_lost_or_doubled() -> None:
    routers = ScriptedRouters([serve_two_then_die, serve_two_then_die, serve_whole])
    deltas = run(collect(relay_of(routers)))
    assert token_ids(deltas) == list(range(NUM_TOKENS))
    assert [(request.attempt, request.resume_ids) for request in routers.requests] == [
        (0, []),
        (1, [0, 1]),
        (2, [0, 1, 2, 3]),
    ]
    assert routers.streams == {}


def test_a_lost_connection_replaces_the_router_and_aborts_its_call() -> None:
    async def lose_connection(attempt: Attempt) -> CallEnd:
        attempt.send(0)
        attempt.stream.fail("connection lost")
        await asyncio.Event().wait()
        raise AssertionError

    routers = ScriptedRouters([lose_connection, serve_whole])

    async def follow() -> None:
        assert token_ids(await collect(relay_of(routers))) == list(range(NUM_TOKENS))
        assert routers.num_aborted == 1

    run(follow())


def test_a_request_that_its_router_gave_up_goes_to_another() -> None:
    async def give_up(attempt: Attempt) -> CallEnd:
        return CallEnd(finish_reason=FinishReason.ABORT, error="the gateway could not be reached")

    routers = ScriptedRouters([give_up, serve_whole])
    assert token_ids(run(collect(relay_of(routers)))) == list(range(NUM_TOKENS))


def test_the_last_tokens_may_come_after_the_end_of_the_call() -> None:
    async def end_early(attempt: Attempt) -> CallEnd:
        asyncio.get_running_loop().call_later(0.05, attempt.send_rest)
        return STOPPED

    routers = ScriptedRouters([end_early])
    assert token_ids(run(collect(relay_of(routers)))) == list(range(NUM_TOKENS))
    assert len(routers.requests) == 1


def test_last_tokens_that_never_come_cost_another_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.front.relay.LAST_TOKENS_TIMEOUT_S", 0.05)

    async def lose_tokens(attempt: Attempt) -> CallEnd:
        return STOPPED

    routers = ScriptedRouters([lose_tokens, serve_whole])
    assert token_ids(run(collect(relay_of(routers)))) == list(range(NUM_TOKENS))
    assert len(routers.requests) == 2


def test_a_full_queue_refuses_a_new_request() -> None:
    with pytest.raises(ServiceError) as failure:
        run(collect(relay_of(ScriptedRouters([refuse_full]))))
    assert failure.value.code is StatusCode.RESOURCE_EXHAUSTED


def test_a_request_that_is_under_way_waits_for_a_full_queue() -> None:
    routers = ScriptedRouters([serve_two_then_die, refuse_full, serve_whole])
    assert token_ids(run(collect(relay_of(routers)))) == list(range(NUM_TOKENS))


def test_without_any_router_a_request_ends_after_its_deadline() -> None:
    async def lost(attempt: Attempt) -> CallEnd:
        raise RouterLostError("no router")

    limits = RelayLimits(stream_interval_s=0.0, resubmit_timeout_s=0.2)
    with pytest.raises(ServiceError) as failure:
        run(collect(relay_of(ScriptedRouters([lost]), limits=limits)))
    assert failure.value.code is StatusCode.UNAVAILABLE


@pytest.mark.parametrize("by_stream", [True, False])
def test_a_routers_refusal_reaches_the_client_with_its_code(by_stream: bool) -> None:
    async def refuse(attempt: Attempt) -> CallEnd:
        error: dict[str, Any] = {"error": "expert 3 is missing", "error_code": ErrorCode.UNAVAILABLE}
        if by_stream:
            attempt.send(finish_reason=FinishReason.ERROR, **error)
        return CallEnd(finish_reason=FinishReason.ERROR, **error)

    with pytest.raises(ServiceError, match="expert 3 is missing") as failure:
        run(collect(relay_of(ScriptedRouters([refuse]))))
    assert failure.value.code is StatusCode.UNAVAILABLE


def test_what_went_wrong_inside_stays_inside() -> None:
    async def fail(attempt: Attempt) -> CallEnd:
        return CallEnd(finish_reason=FinishReason.ERROR, error="KeyError: 'x'", error_code=ErrorCode.INTERNAL)

    with pytest.raises(ServiceError) as failure:
        run(collect(relay_of(ScriptedRouters([fail]))))
    assert (failure.value.code, failure.value.message) == (StatusCode.INTERNAL, "internal error")


def test_tokens_that_came_before_a_failure_are_handed_on() -> None:
    async def follow() -> list[int]:
        received: list[int] = []
        try:
            async for batch in relay_of(ScriptedRouters([fail_in_turns])).batches():
                received += token_ids(batch)
        except ServiceError:
            return received
        raise AssertionError

    async def fail_in_turns(attempt: Attempt) -> CallEnd:
        attempt.send(0, 1)
        await asyncio.sleep(0.01)
        attempt.send(finish_reason=FinishReason.ERROR, error="gone", error_code=ErrorCode.UNAVAILABLE)
        return CallEnd(finish_reason=FinishReason.ERROR)

    assert run(follow()) == [0, 1]


def test_choices_run_side_by_side() -> None:
    meeting = asyncio.Barrier(2)

    async def meet(attempt: Attempt) -> CallEnd:
        await meeting.wait()
        attempt.send_rest()
        return STOPPED

    deltas = run(collect(relay_of(ScriptedRouters([meet]), journal(0), journal(1))))
    assert token_ids(deltas, 0) == list(range(NUM_TOKENS))
    assert token_ids(deltas, 1) == list(range(100, 100 + NUM_TOKENS))


def test_leaving_the_stream_aborts_every_choice() -> None:
    async def never_end(attempt: Attempt) -> CallEnd:
        attempt.send(0)
        await asyncio.Event().wait()
        raise AssertionError

    routers = ScriptedRouters([never_end])

    async def leave() -> None:
        batches = relay_of(routers, journal(0), journal(1)).batches()
        await anext(batches)
        await batches.aclose()
        assert routers.num_aborted == 2
        assert routers.streams == {}

    run(leave())


def test_a_choice_that_fails_takes_the_others_with_it() -> None:
    async def fail_second(attempt: Attempt) -> CallEnd:
        if attempt.request.params.choice_index == 1:
            return CallEnd(finish_reason=FinishReason.ERROR, error="no", error_code=ErrorCode.UNAVAILABLE)
        await asyncio.Event().wait()
        raise AssertionError

    routers = ScriptedRouters([fail_second])

    async def follow() -> None:
        with pytest.raises(ServiceError):
            await collect(relay_of(routers, journal(0), journal(1)))
        assert routers.num_aborted == 1

    run(follow())


def test_a_choice_whose_end_the_client_has_seen_is_not_submitted() -> None:
    routers = ScriptedRouters([serve_whole])
    seen = journal(1, resume_ids=[7], already_finished=True)
    deltas = run(collect(relay_of(routers, journal(0), seen)))
    assert [request.params.choice_index for request in routers.requests] == [0]
    assert token_ids(deltas, 1) == []


def test_tokens_that_gather_within_the_interval_come_together() -> None:
    limits = RelayLimits(stream_interval_s=3600.0, resubmit_timeout_s=1.0)

    async def drip(attempt: Attempt) -> CallEnd:
        for token_id in range(NUM_TOKENS - 1):
            attempt.send(token_id)
            await asyncio.sleep(0.005)
        attempt.send(NUM_TOKENS - 1, finish_reason=FinishReason.LENGTH)
        return STOPPED

    deltas = run(collect(relay_of(ScriptedRouters([drip]), limits=limits)))
    assert [list(delta.token_ids) for delta in deltas] == [[0], [1, 2, 3, 4, 5]]


def test_the_last_token_does_not_wait_for_the_interval() -> None:
    limits = RelayLimits(stream_interval_s=3600.0, resubmit_timeout_s=1.0)

    async def serve_in_two(attempt: Attempt) -> CallEnd:
        attempt.send(0)
        await asyncio.sleep(0.01)
        attempt.send(1, finish_reason=FinishReason.LENGTH)
        return STOPPED

    deltas = run(collect(relay_of(ScriptedRouters([serve_in_two]), limits=limits)))
    assert [list(delta.token_ids) for delta in deltas] == [[0], [1]]


def test_the_first_token_of_each_choice_does_not_wait_for_the_interval() -> None:
    limits = RelayLimits(stream_interval_s=3600.0, resubmit_timeout_s=1.0)

    async def speak_in_turn(attempt: Attempt) -> CallEnd:
        await asyncio.sleep(0.01 * attempt.request.params.choice_index)
        attempt.send(attempt.request.params.choice_index)
        await asyncio.Event().wait()
        raise AssertionError

    async def listen() -> None:
        batches = relay_of(ScriptedRouters([speak_in_turn]), journal(0), journal(1), limits=limits).batches()
        assert token_ids(await anext(batches), 0) == [0]
        assert token_ids(await anext(batches), 1) == [1]
        await batches.aclose()

    run(listen())


def test_a_first_step_without_a_token_is_no_message_and_does_not_slow_the_first_token() -> None:
    limits = RelayLimits(stream_interval_s=3600.0, resubmit_timeout_s=1.0)

    async def begin_and_speak(attempt: Attempt) -> CallEnd:
        attempt.send(since_begin_s=0.1)
        await asyncio.sleep(0.01)
        attempt.send(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def listen() -> None:
        batches = relay_of(ScriptedRouters([begin_and_speak]), limits=limits).batches()
        assert token_ids(await anext(batches)) == [0]
        await batches.aclose()

    run(listen())


def test_a_lost_router_costs_one_line_that_names_request_router_and_reason() -> None:
    lost = journal()
    with recorded("arriero.gateway") as lines:
        run(collect(relay_of(ScriptedRouters([serve_two_then_die, serve_whole]), lost)))
    assert [line.getMessage() for line in lines] == ["attempt 0 failed: killed"]
    assert fields_of(lines[0])["request_id"] == lost.engine_id
    assert lines[0].exc_info is None
