"""A request is worked on for as long as its client is there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from cluster.front.openai.api_error import ApiError
from cluster.front.openai.events import event
from cluster.front.openai.exchange import ClientGoneError, Exchange

logger = logging.getLogger("arriero.gateway")

BODY_TIMEOUT_S = 60.0

Handler = Callable[[Exchange, bytes], Awaitable[None]]


async def attend(exchange: Exchange, handler: Handler, *, max_body_bytes: int | None) -> None:
    """Reads the body (max_body_bytes None: there is none) and lets the handler respond. When the client goes, the
    handler is cancelled where it waits. Whatever it raises becomes an error in OpenAI's shape, never a stack trace.

    The edge of a request: raises nothing but CancelledError.
    """
    try:
        body = b""
        if max_body_bytes is not None:
            body = await exchange.read_body(max_bytes=max_body_bytes, timeout_s=BODY_TIMEOUT_S)
        await _run_until_gone(exchange, handler, body)
    except ClientGoneError:
        await exchange.end_unheard()
    except ApiError as error:
        await _fail(exchange, error)
    except Exception:
        logger.exception("an HTTP request failed")
        await _fail(exchange, ApiError(500, "internal error"))


async def _run_until_gone(exchange: Exchange, handler: Handler, body: bytes) -> None:
    """Serve (2.60) cancels the call of a client that goes, but loses a cancellation that comes while the call is on its
    way to this process. The disconnect itself is never lost, so that is what we watch."""
    work = asyncio.ensure_future(handler(exchange, body))
    watch = asyncio.create_task(exchange.wait_until_gone())
    try:
        await asyncio.wait([work, watch], return_when=asyncio.FIRST_COMPLETED)
        # The first to end says how it ended; an answer that is complete counts, whoever has gone meanwhile.
        (work if work.done() else watch).result()
    finally:
        work.cancel()
        watch.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


async def _fail(exchange: Exchange, error: ApiError) -> None:
    """As a response, or, where that has begun, as the last event of its stream."""
    if exchange.has_begun:
        await exchange.send_events(event(error.body()), more=False)
    else:
        await exchange.respond(error.body(), status=error.status, headers=error.headers)
