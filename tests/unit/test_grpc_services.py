"""A stream whose client may go at any moment, as Serve's proxy iterates over it. Every test has its own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from cluster.front.grpc_services import attentive


class Context:
    """grpcio's, of which peer() must not be called once the call has ended."""

    def __init__(self) -> None:
        self.has_ended = False

    def end(self) -> None:
        self.has_ended = True

    def peer(self) -> str:
        assert not self.has_ended
        return "ipv4:127.0.0.1:1"

    def code(self) -> int:
        return 7


class Handler:
    """Gives a message, then waits for the next one for ever. Hears there of its end, as Serve's handlers do. It takes
    until it ``may_arrive`` before the first message."""

    def __init__(self) -> None:
        self.may_arrive = asyncio.Event()
        self.is_waiting = asyncio.Event()
        self.ended = asyncio.Event()
        self.asked: list[Any] = []

    async def __call__(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            await self.may_arrive.wait()
            yield request
            self.is_waiting.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.asked += [context.peer(), context.code()]
            self.ended.set()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def in_time() -> None:
        async with asyncio.timeout(5):
            await test()

    asyncio.run(in_time())


def test_messages_come_in_order_and_then_the_error() -> None:
    async def fail(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield request
        yield b"2"
        raise RuntimeError("the third")

    async def test() -> None:
        stream = attentive(fail)(b"1", Context())
        assert [await anext(stream), await anext(stream)] == [b"1", b"2"]
        with pytest.raises(RuntimeError, match="the third"):
            await anext(stream)

    run(test)


def test_a_stream_that_ends_ends() -> None:
    async def two(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield request
        yield request

    async def test() -> None:
        assert [message async for message in attentive(two)(b"1", Context())] == [b"1", b"1"]

    run(test)


@pytest.mark.parametrize("is_late", [False, True])
def test_the_gateways_word_that_the_call_has_arrived_goes_no_further(is_late: bool) -> None:
    async def arrive(request: bytes, context: Any) -> AsyncIterator[bytes]:
        if is_late:
            await asyncio.sleep(0.05)
        yield b""
        yield request
        yield b""

    async def test() -> None:
        stream = attentive(arrive, arrival_s=0.01 if is_late else 60)(b"1", Context())
        assert [message async for message in stream] == [b"1", b""]

    run(test)


@pytest.mark.parametrize("has_arrived", [False, True])
def test_a_call_is_not_cancelled_while_it_is_on_its_way(has_arrived: bool) -> None:
    async def test() -> None:
        handler = Handler()

        async def call() -> None:
            async for _ in attentive(handler, arrival_s=60)(b"", Context()):
                pass

        task = asyncio.create_task(call())
        if has_arrived:
            handler.may_arrive.set()
            await handler.is_waiting.wait()
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        for _ in range(10):
            await asyncio.sleep(0)
        assert handler.ended.is_set() == has_arrived
        handler.may_arrive.set()
        await handler.ended.wait()

    run(test)


def test_a_call_that_does_not_arrive_is_cancelled_in_the_end() -> None:
    async def test() -> None:
        handler = Handler()

        async def call() -> None:
            async for _ in attentive(handler, arrival_s=0.01)(b"", Context()):
                pass

        task = asyncio.create_task(call())
        await asyncio.sleep(0)
        task.cancel()
        await handler.ended.wait()

    run(test)


@pytest.mark.parametrize("is_sending", [False, True], ids=["while it waits for a message", "while it sends one"])
def test_the_handler_hears_of_a_client_that_goes(is_sending: bool) -> None:
    async def test() -> None:
        handler, context = Handler(), Context()

        async def call() -> None:
            async for _ in attentive(handler)(b"1", context):
                if is_sending:
                    await asyncio.Event().wait()

        handler.may_arrive.set()
        task = asyncio.create_task(call())
        task.add_done_callback(lambda _: context.end())
        await handler.is_waiting.wait()
        task.cancel()
        await handler.ended.wait()
        assert handler.asked == ["ipv4:127.0.0.1:1", 7]

    run(test)
