"""What becomes of a handle call, against handles that behave as Serve's do."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from cluster.front import serve_routers
from cluster.front.errors import ServiceError, StatusCode
from cluster.front.prefix_index import prefix_keys
from cluster.front.relay import CallEnd, QueueFullError, RouterLostError
from cluster.front.serve_routers import ServeRouters
from router.messages import Finished, FinishReason, GenerateRequest, encode
from router.sampling_params import SamplingParams

REQUEST = GenerateRequest(request_id="r", prompt_ids=[1], params=SamplingParams())


class FakeResponse:
    def __init__(self, answer: Callable[[], Awaitable[bytes]]) -> None:
        self._answer = answer
        self.cancelled = asyncio.Event()

    def __await__(self) -> Any:
        return self._answer().__await__()

    def cancel(self) -> None:
        self.cancelled.set()


class FakeHandle:
    """handle.generate.remote(...), always with the same answer."""

    def __init__(self, answer: Callable[[], Awaitable[bytes]]) -> None:
        self.response = FakeResponse(answer)
        self.shunned: list[str] = []
        self.prefix = b""

    @property
    def generate(self) -> "FakeHandle":
        return self

    def remote(self, request: bytes, *, weights_version: int, shun: list[str], prefix: bytes) -> FakeResponse:
        self.shunned, self.prefix = shun, prefix
        return self.response


async def never() -> bytes:
    await asyncio.Event().wait()
    raise AssertionError


def failing(error: Exception) -> Callable[[], Awaitable[bytes]]:
    async def fail() -> bytes:
        raise error

    return fail


def routers(handle: FakeHandle, *, num_ready: Callable[[], int] = lambda: 1) -> ServeRouters:
    return ServeRouters(handle, num_ready=num_ready, absence_timeout_s=0.05)


def run(act: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(20):
            return await act

    return asyncio.run(bounded())


def test_the_end_of_a_request_comes_back() -> None:
    async def answer() -> bytes:
        return encode(Finished(request_id="r", attempt=0, finish_reason=FinishReason.ABORT, error="why"))

    end = run(routers(FakeHandle(answer)).generate(REQUEST))
    assert end == CallEnd(finish_reason=FinishReason.ABORT, error="why")


@pytest.mark.parametrize("error", [ActorDiedError(), DeploymentUnavailableError(None)])  # type: ignore[arg-type]
def test_a_router_that_is_gone_is_lost(error: Exception) -> None:
    with pytest.raises(RouterLostError, match=type(error).__name__):
        run(routers(FakeHandle(failing(error))).generate(REQUEST))


def test_a_router_that_failed_in_the_call_says_why_in_one_line() -> None:
    cause = RuntimeError("engine process 7 ended with signal SIGKILL")
    error = RayTaskError("generate", "Traceback\n  line\nmore", cause)
    with pytest.raises(RouterLostError) as failure:
        run(routers(FakeHandle(failing(error))).generate(REQUEST))
    assert str(failure.value) == "the router is lost: engine process 7 ended with signal SIGKILL"


def test_a_full_queue_is_told_apart() -> None:
    error = BackPressureError(num_queued_requests=3, max_queued_requests=3)
    with pytest.raises(QueueFullError):
        run(routers(FakeHandle(failing(error))).generate(REQUEST))


def test_leaving_a_call_cancels_it_at_the_router_at_once() -> None:
    handle = FakeHandle(never)

    async def leave() -> None:
        call = asyncio.create_task(routers(handle).generate(REQUEST))
        await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.wait([call])
        await handle.response.cancelled.wait()

    run(leave())


def test_a_call_that_finds_no_router_is_given_up_in_time() -> None:
    handle = FakeHandle(never)
    with pytest.raises(ServiceError) as failure:
        run(routers(handle, num_ready=lambda: 0).generate(REQUEST))
    assert failure.value.code is StatusCode.UNAVAILABLE
    assert handle.response.cancelled.is_set()


def test_a_busy_router_may_take_its_time() -> None:
    async def slow() -> bytes:
        await asyncio.sleep(0.3)
        return encode(Finished(request_id="r", attempt=0, finish_reason=FinishReason.STOP))

    looks = iter([0, 0, 0, 1] * 100)
    end = run(routers(FakeHandle(slow), num_ready=lambda: next(looks)).generate(REQUEST))
    assert end.finish_reason is FinishReason.STOP


def test_a_router_whose_engine_is_silent_is_shunned_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer() -> bytes:
        return encode(
            Finished(request_id="r", attempt=0, finish_reason=FinishReason.ABORT, error="silent", suspect="replica-7")
        )

    async def scenario() -> None:
        handle = FakeHandle(answer)
        asking = routers(handle)
        shunned = []
        for _ in range(2):
            await asking.generate(REQUEST)
            shunned.append(handle.shunned)
        monkeypatch.setattr(serve_routers, "SHUN_S", 0.0)
        await asking.generate(REQUEST)
        await asking.generate(REQUEST)
        assert [*shunned, handle.shunned] == [[], ["replica-7"], []]

    run(scenario())


def test_routers_on_nodes_that_are_to_go_are_shunned() -> None:
    async def answer() -> bytes:
        return encode(Finished(request_id="r", attempt=0, finish_reason=FinishReason.STOP))

    handle = FakeHandle(answer)
    asking = ServeRouters(handle, num_ready=lambda: 1, absence_timeout_s=0.05, draining_nodes=lambda: ["node-1"])
    run(asking.generate(REQUEST))
    assert handle.shunned == ["node-1"]


def prefix_sent(request: GenerateRequest, *, num_routers: int = 2, block_size: int | None = 4) -> bytes:
    async def answer() -> bytes:
        return encode(Finished(request_id="r", attempt=0, finish_reason=FinishReason.STOP))

    handle = FakeHandle(answer)
    asking = ServeRouters(handle, num_ready=lambda: num_routers, absence_timeout_s=0.05, prefix_block_size=block_size)
    run(asking.generate(request))
    return handle.prefix


def test_a_request_goes_with_the_keys_of_its_prompt_and_of_what_it_resumes() -> None:
    keys = prefix_keys(range(12), block_size=4, weights_version=3, cache_salt="mine")
    resumed = GenerateRequest(
        request_id="r",
        prompt_ids=[0, 1, 2],
        resume_ids=[*range(3, 12)],
        params=SamplingParams(),
        cache_salt="mine",
        weights_version=3,
    )
    assert prefix_sent(resumed) == keys != b""


def test_no_keys_are_computed_where_they_decide_nothing() -> None:
    request = GenerateRequest(request_id="r", prompt_ids=[*range(12)], params=SamplingParams())
    assert prefix_sent(request, num_routers=1) == b""
    assert prefix_sent(request, block_size=None) == b""
    with_logprobs = GenerateRequest(
        request_id="r", prompt_ids=[*range(12)], params=SamplingParams(num_prompt_logprobs=1)
    )
    assert prefix_sent(with_logprobs) == b""
    assert prefix_sent(request) != b""
