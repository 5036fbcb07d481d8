"""A router as its Serve replica has it, with a scripted engine in a real process."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from engine_harness import has_gone, listening, request, start_message, wait_until_async
from scripted_engine import HANGING_STEP

from router.engine_client import EngineDiedError
from router.messages import ErrorCode, Finished, FinishReason, decode_finished, encode
from router.replica import Router, RouterTimeouts

TIMEOUTS = RouterTimeouts(start_s=30.0, close_s=1.0)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def _router(deaths: list[str], timeouts: RouterTimeouts = TIMEOUTS) -> Router:
    return Router(timeouts=timeouts, on_death=deaths.append, name="replica-7", module="scripted_engine")


def test_requests_and_their_ends_travel_as_bytes() -> None:
    deaths: list[str] = []

    async def scenario() -> None:
        router = _router(deaths)
        ready = await router.start(start_message())
        assert ready.pid == router.engine_pid
        async with listening() as listener:
            answer = await router.generate(encode(request("a", 1, address=listener.address, max_tokens=2)))
            assert decode_finished(answer).finish_reason is FinishReason.LENGTH
        router.check_health()
        await wait_until_async(lambda: router.stats is not None)
        await asyncio.to_thread(router.close)
        await asyncio.to_thread(router.close)
        assert has_gone(router.engine_pid)

    asyncio.run(scenario())
    assert deaths == [], "an engine that was asked to end has not died"


def test_bytes_that_are_no_request_are_refused() -> None:
    async def scenario() -> None:
        router = _router([])
        try:
            await router.start(start_message())
            wrong_type = encode(request("a", 1, address="")).replace(b"prompt_ids", b"prompt_idz")
            for nonsense in (b"", b"\xc1", wrong_type):
                finished = decode_finished(await router.generate(nonsense))
                assert finished.finish_reason is FinishReason.ERROR
                assert finished.error_code is ErrorCode.INVALID_ARGUMENT
        finally:
            await asyncio.to_thread(router.close)

    asyncio.run(scenario())


def test_a_start_that_fails_or_takes_too_long_leaves_no_process_and_is_no_death() -> None:
    deaths: list[str] = []

    async def scenario() -> None:
        unbuildable = _router(deaths)
        with pytest.raises(EngineDiedError, match="'unbuildable' cannot be built"):
            await unbuildable.start(start_message("unbuildable"))
        assert has_gone(unbuildable.engine_pid)
        hasty = _router(deaths, RouterTimeouts(start_s=0.0, close_s=1.0))
        with pytest.raises(EngineDiedError, match=r"not ready after 0\.0 s"):
            await hasty.start(start_message())
        assert has_gone(hasty.engine_pid)

    asyncio.run(scenario())
    assert deaths == []


def test_a_ready_engine_that_dies_is_told_once() -> None:
    deaths: list[str] = []

    async def scenario() -> None:
        router = _router(deaths)
        await router.start(start_message())
        os.kill(router.engine_pid, signal.SIGKILL)
        await wait_until_async(lambda: bool(deaths))
        with pytest.raises(EngineDiedError, match="SIGKILL"):
            router.check_health()
        await asyncio.to_thread(router.close)

    asyncio.run(scenario())
    assert len(deaths) == 1


def test_a_router_whose_engine_hangs_is_unhealthy() -> None:
    async def scenario() -> None:
        router = _router([], RouterTimeouts(start_s=30.0, step_s=0.5, close_s=0.5))
        await router.start(start_message())
        async with listening() as listener:
            call = asyncio.create_task(router.generate(encode(request("a", HANGING_STEP, address=listener.address))))
            await wait_until_async(lambda: _complaint(router) != "")
            assert "hangs in step" in _complaint(router)
            await asyncio.to_thread(router.close)
            lost = decode_finished(await call)
            assert (lost.finish_reason, lost.suspect) == (FinishReason.ABORT, "replica-7")

    asyncio.run(scenario())


def test_a_step_that_hangs_and_an_engine_that_is_silent_are_named(caplog: pytest.LogCaptureFixture) -> None:
    def has_been_named(router: Router, trouble: str) -> bool:
        router.check_health()
        return any(trouble in line and line.endswith("; open: mine/0af3/0") for line in caplog.messages)

    async def scenario() -> None:
        router = _router([], RouterTimeouts(start_s=30.0, slow_step_s=0.5, silent_s=2.5, doubt_s=60.0, close_s=0.5))
        await router.start(start_message())
        async with listening() as listener:
            hanging = request("mine/0af3/0", HANGING_STEP, address=listener.address)
            call = asyncio.create_task(router.generate(encode(hanging)))
            await wait_until_async(lambda: has_been_named(router, "step 1 has taken"))
            os.kill(router.engine_pid, signal.SIGSTOP)
            await wait_until_async(lambda: has_been_named(router, "the engine process has been silent for"))
            os.kill(router.engine_pid, signal.SIGCONT)
            await asyncio.to_thread(router.close)
            assert decode_finished(await call).finish_reason is FinishReason.ABORT

    asyncio.run(scenario())


def test_a_silent_engine_is_doubted_until_it_speaks_and_forgets_what_others_have_taken_over() -> None:
    told: list[bool] = []

    async def scenario() -> None:
        router = Router(
            timeouts=RouterTimeouts(start_s=30.0, doubt_s=1.0, close_s=1.0),
            on_doubt=lambda: told.append(router.is_doubted),
            name="replica-7",
            module="scripted_engine",
        )
        await router.start(start_message())
        async with listening() as listener:

            async def finished(name: str, max_tokens: int) -> Finished:
                asked = request(name, 1, address=listener.address, max_tokens=max_tokens)
                return decode_finished(await router.generate(encode(asked)))

            with listener.open("endless", 0) as stream:
                endless = asyncio.create_task(finished("endless", 1_000_000))
                await anext(stream)
                os.kill(router.engine_pid, signal.SIGSTOP)
                given_up = await endless
            assert (given_up.finish_reason, given_up.suspect) == (FinishReason.ABORT, "replica-7")
            assert "has been silent for" in (given_up.error or "")
            assert (await finished("refused", 1)).suspect == "replica-7", "nothing waits for a silent engine"
            os.kill(router.engine_pid, signal.SIGCONT)
            await wait_until_async(lambda: not router.is_doubted)
            with listener.open("taken", 0):
                answered = await finished("taken", 2)
            assert (answered.finish_reason, answered.suspect) == (FinishReason.LENGTH, None)
            await wait_until_async(lambda: router.stats is not None and router.stats.num_running == 0)
        await asyncio.to_thread(router.close)

    asyncio.run(scenario())
    assert told == [True, False]


def _complaint(router: Router) -> str:
    try:
        router.check_health()
    except EngineDiedError as error:
        return str(error)
    return ""


def test_a_router_can_be_closed_before_it_is_started() -> None:
    deaths: list[str] = []
    router = _router(deaths)
    router.close()
    assert has_gone(router.engine_pid)
    assert deaths == []
