"""Our services as Serve's gRPC proxy takes them: its `grpc_servicer_functions` name functions of this module.

Serve's proxy (2.60) tells a replica that a client has gone only while it waits for the replica's next message. A
client that goes while a message is being sent to it is forgotten, and the replica generates to the end for nobody.
So here a task of its own always waits for the next message, and ends with the call however that ends. It may also lose
a cancellation that comes while the call is on its way to the replica. So a call is left to arrive first: the gateway
says that it has by a first message that is empty, and meant for us alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from cluster.v1 import admin_pb2_grpc, generation_pb2_grpc

Handler = Callable[[Any, Any], AsyncIterator[bytes]]

# How long a call may be on its way to a replica before it is cancelled at any risk.
ARRIVAL_S = 10.0


def add_generation_service(servicer: Any, server: Any) -> None:
    """server: Serve's, which puts handlers of its own factory in the place of the servicer's."""
    make_handler = server.service_handler_factory

    def make_attentive_handler(*, service_method: str, streaming_type: Any) -> Any:
        handler = make_handler(service_method=service_method, streaming_type=streaming_type)
        return attentive(handler) if streaming_type.name == "UNARY_STREAM" else handler

    server.service_handler_factory = make_attentive_handler
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, server)
    server.service_handler_factory = make_handler


def add_admin_service(servicer: Any, server: Any) -> None:
    admin_pb2_grpc.add_AdminServiceServicer_to_server(servicer, server)


class CallContext:
    """grpcio's context of a call, for code that may outlive the call: grpcio then reads freed memory for peer()."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._peer: str = context.peer()

    def peer(self) -> str:
        return self._peer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def attentive(handler: Handler, *, arrival_s: float = ARRIVAL_S) -> Handler:
    """The same stream of messages. When the task that iterates over it ends, whatever it was doing then, the handler
    is cancelled where it waits for its next message, but not before it has given one or is arrival_s old. A first
    message that is empty goes no further."""

    async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        call, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert call is not None
        # Done when the call has arrived, or is not expected to arrive any more.
        arrival = loop.create_future()
        timer = loop.call_later(arrival_s, arrival.cancel)
        arrival.add_done_callback(lambda _: timer.cancel())
        reader = asyncio.create_task(_read(handler(request, CallContext(context)), messages, arrival))
        reader.add_done_callback(lambda _: messages.put_nowait(None))
        call.add_done_callback(lambda _: arrival.add_done_callback(lambda _: reader.cancel()))
        while (message := await messages.get()) is not None:
            yield message
        await reader

    return stream


async def _read(
    stream: AsyncIterator[bytes], messages: asyncio.Queue[bytes | None], arrival: asyncio.Future[None]
) -> None:
    """Never waits for the client: messages wait here that would otherwise wait on their way here."""
    is_first = True
    async for message in stream:
        if not arrival.done():
            arrival.set_result(None)
        if message or not is_first:
            messages.put_nowait(message)
        is_first = False
