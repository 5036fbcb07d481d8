"""The engine process as its replica sees it: real processes, a scripted engine, the real token path."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path

import pytest
from engine_harness import (
    CLOSE_S,
    READY_S,
    SECRET,
    answer,
    has_gone,
    listening,
    num_fds,
    num_threads,
    request,
    running_engine,
    start_message,
    wait_until,
    wait_until_async,
)
from scripted_engine import BABBLE, FAILING_STEP, HANGING_STEP, NUM_BLOCKS, REFUSED, SILENT

from cluster.front.token_stream import StreamBrokenError
from router.engine_client import EngineClient, EngineDiedError
from router.messages import ErrorCode, FinishReason

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


@pytest.fixture
def engine() -> Iterator[EngineClient]:
    with running_engine() as client:
        yield client


def _free_blocks(client: EngineClient) -> int | None:
    stats = client.stats()
    return None if stats is None else stats.num_free_blocks["global"]


def _complaint(client: EngineClient, *, heartbeat_timeout_s: float = 30, step_timeout_s: float = 30) -> str:
    try:
        client.check_health(heartbeat_timeout_s=heartbeat_timeout_s, step_timeout_s=step_timeout_s)
    except EngineDiedError as error:
        return str(error)
    return ""


def test_tokens_reach_the_gateway_and_the_call_ends_with_the_request(engine: EngineClient) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            with listener.open("a", 0) as stream:
                call = asyncio.create_task(engine.generate(request("a", 10, address=listener.address, max_tokens=5)))
                outputs = [output async for output in stream]
                assert [token for output in outputs for token in output.token_ids] == [11, 12, 13, 14, 15]
                assert outputs[-1].finish_reason is FinishReason.LENGTH
                assert (await call).finish_reason is FinishReason.LENGTH
        assert listener.num_late_outputs == 0

    asyncio.run(scenario())


def test_an_engine_that_cannot_be_built_says_why_and_is_gone() -> None:
    client = EngineClient(module="scripted_engine")
    with pytest.raises(EngineDiedError, match="'unbuildable' cannot be built"):
        client.start(start_message("unbuildable"), READY_S)
    wait_until(lambda: has_gone(client.pid))
    client.close(CLOSE_S)


@pytest.mark.parametrize("model", BABBLE)
def test_an_engine_that_sends_no_messages_of_ours_has_failed(model: str) -> None:
    client = EngineClient(module="scripted_engine")
    try:
        with pytest.raises(EngineDiedError, match="the engine process sent no message of ours"):
            client.start(start_message(model), READY_S)
    finally:
        client.close(CLOSE_S)
    assert has_gone(client.pid)


def test_a_missing_checkpoint_is_named_by_the_real_engine_process(tmp_path: Path) -> None:
    client = EngineClient()
    try:
        with pytest.raises(EngineDiedError, match="no-such-model"):
            client.start(start_message(str(tmp_path / "no-such-model")), READY_S)
    finally:
        client.close(CLOSE_S)
    assert has_gone(client.pid)


def test_a_request_the_engine_refuses_ends_alone(engine: EngineClient) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            finished = await engine.generate(request("bad", REFUSED, address=listener.address))
            assert finished.finish_reason is FinishReason.ERROR
            assert finished.error_code is ErrorCode.INVALID_ARGUMENT
            assert finished.error == f"prompt_ids[0] must not be {REFUSED}"
            unreachable = await engine.generate(request("bad", 1, address="nowhere"))
            assert unreachable.error == "return_address must be host:port, not 'nowhere'"
            good = await answer(engine, listener, request("good", 1, address=listener.address, max_tokens=1))
            assert good.finish_reason is FinishReason.LENGTH

    asyncio.run(scenario())


def test_a_failing_step_fails_every_open_call_with_its_reason() -> None:
    deaths: list[str] = []

    async def scenario(client: EngineClient) -> None:
        async with listening() as listener:
            with listener.open("a", 0), listener.open("b", 0):
                bystander = asyncio.create_task(client.generate(request("a", 1, address=listener.address)))
                culprit = asyncio.create_task(client.generate(request("b", FAILING_STEP, address=listener.address)))
                for call in (bystander, culprit):
                    with pytest.raises(EngineDiedError, match="a step failed: RuntimeError: the scripted step failed"):
                        await call

    with running_engine(on_death=deaths.append) as client:
        asyncio.run(scenario(client))
        with pytest.raises(EngineDiedError, match="scripted step"):
            client.check_health(heartbeat_timeout_s=10, step_timeout_s=10)
        wait_until(lambda: len(deaths) == 1)


def test_a_killed_engine_breaks_its_streams_and_its_calls(engine: EngineClient) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            with listener.open("a", 0) as stream:
                call = asyncio.create_task(engine.generate(request("a", 1, address=listener.address)))
                await anext(stream)
                os.kill(engine.pid, signal.SIGKILL)
                with pytest.raises(StreamBrokenError, match="router-a"):
                    async for _output in stream:
                        pass
                with pytest.raises(EngineDiedError, match="SIGKILL"):
                    await call
            with pytest.raises(EngineDiedError, match="SIGKILL"):
                await engine.generate(request("b", 1, address=listener.address))

    asyncio.run(scenario())


def test_heartbeats_come_from_an_idle_engine_and_tell_of_a_step_that_hangs(engine: EngineClient) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            call = asyncio.create_task(engine.generate(request("a", HANGING_STEP, address=listener.address)))
            assert _complaint(engine, step_timeout_s=0.5) == ""
            await wait_until_async(lambda: "hangs in step" in _complaint(engine, step_timeout_s=0.5))
            call.cancel()

    wait_until(lambda: engine.stats() is not None)
    asyncio.run(scenario())
    began = time.monotonic()
    engine.close(0.5)
    assert has_gone(engine.pid), "an engine that hangs must be ended against its will"
    assert time.monotonic() - began < 3


def test_a_stopped_engine_is_missed(engine: EngineClient) -> None:
    wait_until(lambda: engine.stats() is not None)
    os.kill(engine.pid, signal.SIGSTOP)

    wait_until(lambda: "no heartbeat" in _complaint(engine, heartbeat_timeout_s=2))
    engine.close(0.2)
    assert has_gone(engine.pid)


def test_cancelling_a_call_gives_its_block_back(engine: EngineClient) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            with listener.open("a", 0) as stream:
                call = asyncio.create_task(engine.generate(request("a", 1, address=listener.address)))
                await anext(stream)
                await wait_until_async(lambda: _free_blocks(engine) == NUM_BLOCKS - 1)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
            await wait_until_async(lambda: _free_blocks(engine) == NUM_BLOCKS)
            assert engine.num_open == 0

    asyncio.run(scenario())


def test_requests_of_a_gateway_that_hangs_up_are_aborted_and_others_go_on(engine: EngineClient) -> None:
    async def scenario() -> None:
        async with listening() as staying:
            staying.open("other", 0)
            other = asyncio.create_task(engine.generate(request("other", 1, address=staying.address)))
            async with listening() as leaving:
                stream = leaving.open("a", 0)
                call = asyncio.create_task(engine.generate(request("a", 1, address=leaving.address)))
                await anext(stream)
            finished = await asyncio.wait_for(call, 5)
            assert finished.finish_reason is FinishReason.ABORT
            assert finished.error_code is ErrorCode.UNAVAILABLE
            assert "hung up" in (finished.error or "") or "sending failed" in (finished.error or "")
            await wait_until_async(lambda: _free_blocks(engine) == NUM_BLOCKS - 1)
            assert not other.done()
            other.cancel()
            await asyncio.wait([other])

    asyncio.run(scenario())


def test_a_stream_that_is_closed_ends_its_request_though_nobody_cancels_the_call(engine: EngineClient) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            with listener.open("a", 0) as stream:
                call = asyncio.create_task(engine.generate(request("a", 1, address=listener.address)))
                await anext(stream)
            finished = await asyncio.wait_for(call, 10)
            assert (finished.finish_reason, finished.error) == (FinishReason.ABORT, None)
            await wait_until_async(lambda: _free_blocks(engine) == NUM_BLOCKS)

    asyncio.run(scenario())


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_request_that_nobody_waits_for_ends_before_its_first_token(engine: EngineClient, has_begun: bool) -> None:
    """However the cancellation of its call was lost, and whether the engine has the request when its stream closes."""

    async def scenario() -> None:
        async with listening() as listener:
            with listener.open("a", 0) as stream:
                asked = request("a", SILENT, address=listener.address)
                call = asyncio.create_task(engine.generate(asked))
                if has_begun:
                    await wait_until_async(lambda: stream.feeder is not None)
                else:
                    await asyncio.sleep(0)
            assert (await asyncio.wait_for(call, 10)).finish_reason is FinishReason.ABORT
            assert listener.num_late_outputs == 0

    asyncio.run(scenario())


def test_only_the_attempt_that_nobody_waits_for_ends(engine: EngineClient) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            old = listener.open("a", 0)
            first = asyncio.create_task(engine.generate(request("a", SILENT, address=listener.address)))
            await wait_until_async(lambda: old.feeder is not None)
            with listener.open("a", 1) as stream:
                again = asyncio.create_task(engine.generate(request("a", 1, address=listener.address, attempt=1)))
                assert (await first).finish_reason is FinishReason.ABORT
                await anext(stream)
                old.close()
                # Its abort has been read when that of another request, sent later, has been.
                with listener.open("b", 0) as other:
                    call = asyncio.create_task(engine.generate(request("b", SILENT, address=listener.address)))
                    await wait_until_async(lambda: other.feeder is not None)
                await call
                assert not again.done()
                await anext(stream)
            await again

    asyncio.run(scenario())


def test_a_gateway_cannot_end_the_requests_of_another(engine: EngineClient) -> None:
    async def scenario() -> None:
        async with listening() as owner, listening() as other:
            with owner.open("a", 0) as stream:
                call = asyncio.create_task(engine.generate(request("a", 1, address=owner.address)))
                await anext(stream)
                with other.open("b", 0) as ours:
                    bystander = asyncio.create_task(engine.generate(request("b", SILENT, address=other.address)))
                    await wait_until_async(lambda: ours.feeder is not None)
                    assert ours.feeder is not None
                    ours.feeder.abort("a", 0)
                await bystander
                await wait_until_async(lambda: _free_blocks(engine) == NUM_BLOCKS - 1)
                assert not call.done()
            await call

    asyncio.run(scenario())


def test_a_gateway_with_another_secret_gets_no_tokens(engine: EngineClient) -> None:
    async def scenario() -> None:
        async with listening(secret=b"of another cluster") as listener:
            with listener.open("a", 0):
                finished = await asyncio.wait_for(engine.generate(request("a", 1, address=listener.address)), 10)
            assert finished.finish_reason is FinishReason.ABORT
            assert "could not be reached" in (finished.error or "")
            assert listener.num_refused == 1
            assert listener.num_late_outputs == 0

    asyncio.run(scenario())


def test_a_newer_attempt_takes_the_place_of_an_older_one(engine: EngineClient) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            with listener.open("a", 0) as stream:
                first = asyncio.create_task(engine.generate(request("a", 1, address=listener.address)))
                await anext(stream)
            second = request("a", 50, address=listener.address, attempt=1, max_tokens=3)
            with listener.open("a", 1) as stream:
                again = asyncio.create_task(engine.generate(second))
                tokens = [token async for output in stream for token in output.token_ids]
            assert tokens == [51, 52, 53]
            assert (await first).finish_reason is FinishReason.ABORT
            assert (await again).finish_reason is FinishReason.LENGTH

    asyncio.run(scenario())


def test_an_attempt_is_open_only_once(engine: EngineClient) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            call = asyncio.create_task(engine.generate(request("b", 1, address=listener.address)))
            await asyncio.sleep(0)
            with pytest.raises(ValueError, match="'b' attempt 0 is open already"):
                await engine.generate(request("b", 1, address=listener.address))
            call.cancel()
            await asyncio.wait([call])

    asyncio.run(scenario())


def test_two_hundred_aborted_requests_leave_nothing_behind(engine: EngineClient) -> None:
    async def abort_many(address: str, prefix: str, count: int) -> None:
        calls = [
            asyncio.create_task(engine.generate(request(f"{prefix}{index}", 1, address=address)))
            for index in range(count)
        ]
        for index, call in enumerate(calls):
            await asyncio.sleep(index % 3 / 1000)
            call.cancel()
        await asyncio.wait(calls)

    def counts() -> list[int]:
        return [count(pid) for pid in (engine.pid, os.getpid()) for count in (num_fds, num_threads)]

    async def scenario() -> None:
        async with listening() as listener:
            await abort_many(listener.address, "warm", 10)
            # One that ends by itself, so that the connection to the listener is there when we count.
            await answer(engine, listener, request("whole", 1, address=listener.address, max_tokens=3))
            before = counts()
            for round_number in range(4):
                await abort_many(listener.address, f"round{round_number}-", 50)
            await wait_until_async(lambda: _free_blocks(engine) == NUM_BLOCKS)
            # The thread that opened the connection may have been counted on its way out.
            await wait_until_async(lambda: all(now <= then for now, then in zip(counts(), before, strict=True)))
            assert engine.num_open == 0
            assert listener.num_streams == 0
            assert listener.num_connections == 1

    asyncio.run(scenario())


def test_ctrl_c_does_not_end_the_engine(engine: EngineClient) -> None:
    os.kill(engine.pid, signal.SIGINT)

    async def scenario() -> None:
        async with listening() as listener:
            finished = await answer(engine, listener, request("a", 1, address=listener.address, max_tokens=3))
            assert finished.finish_reason is FinishReason.LENGTH

    asyncio.run(scenario())


def test_closing_a_replica_with_open_requests_ends_them_and_the_process(engine: EngineClient) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            listener.open("a", 0)
            call = asyncio.create_task(engine.generate(request("a", 1, address=listener.address)))
            await asyncio.sleep(0)
            await asyncio.to_thread(engine.close, CLOSE_S)
            assert (await call).finish_reason is FinishReason.ABORT

    asyncio.run(scenario())


_REPLICA = """
import sys
from engine_harness import READY_S, start_message
from router.engine_client import EngineClient
client = EngineClient(module="scripted_engine")
client.start(start_message(), READY_S)
print(client.pid, flush=True)
sys.stdin.read()
"""


def test_the_engine_ends_within_a_second_of_its_killed_replica() -> None:
    replica = subprocess.Popen(
        [sys.executable, "-c", _REPLICA], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert replica.stdout is not None
    engine_pid = int(replica.stdout.readline())
    assert not has_gone(engine_pid)
    replica.kill()
    wait_until(lambda: has_gone(engine_pid))
    replica.communicate()


_STEPPARENT = """
import os, subprocess, sys
fd = int(sys.argv[1])
child = subprocess.Popen([sys.executable, "-m", "scripted_engine", str(fd), str(os.getpid())], pass_fds=[fd])
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("has_begun", [False, True])
def test_the_engine_ends_with_its_parent_even_if_the_pipe_stays_open(has_begun: bool) -> None:
    ours, theirs = Pipe()
    parent = subprocess.Popen(
        [sys.executable, "-c", _STEPPARENT, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    engine_pid = int(parent.stdout.readline())
    if has_begun:
        wait_until(lambda: num_threads(engine_pid) == 2)  # It reads the pipe: all precautions are taken.
    parent.kill()
    wait_until(lambda: has_gone(engine_pid))
    parent.communicate()
    ours.close()
    theirs.close()


def test_the_engine_ends_when_the_pipe_does() -> None:
    ours, theirs = Pipe()
    command = [sys.executable, "-m", "scripted_engine", str(theirs.fileno()), str(os.getpid())]
    child = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    ours.close()
    assert child.wait(10) == 1


def test_secrets_are_not_on_the_command_line(engine: EngineClient) -> None:
    assert SECRET not in Path(f"/proc/{engine.pid}/cmdline").read_bytes()
    assert SECRET not in Path(f"/proc/{engine.pid}/environ").read_bytes()
