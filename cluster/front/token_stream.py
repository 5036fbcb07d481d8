"""What a gateway has received for one attempt of one choice and not yet taken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol

from router.messages import SequenceOutput, TokenLogprobs


class StreamBrokenError(ConnectionError):
    """No more tokens will come from this attempt though it has not ended; another attempt may go on from here."""


class Feeder(Protocol):
    """The connection that outputs come from."""

    @property
    def router_id(self) -> str: ...

    def abort(self, request_id: str, attempt: int) -> None: ...


class TokenStream:
    """Async iterator over the outputs of one (request_id, attempt); made by TokenListener.open, used as a context.

    Each item is everything that has gathered since the last, merged into one SequenceOutput, so a slow consumer
    makes items longer, not more numerous. Ends after the item with a finish_reason. Raises StreamBrokenError,
    after what came before, when the router's connection is lost or ``fail`` was called.
    """

    def __init__(self, *, request_id: str, attempt: int, on_close: Callable[[], None]) -> None:
        self.request_id = request_id
        self.attempt = attempt
        self._on_close = on_close
        self._gathered: list[SequenceOutput] = []
        self._error: str | None = None
        self._has_finished = False
        self._news = asyncio.Event()
        # Filled as soon as a router says that it has the request.
        self.feeder: Feeder | None = None

    @property
    def router_id(self) -> str:
        """Empty until a router says that it has the request."""
        return "" if self.feeder is None else self.feeder.router_id

    def put(self, output: SequenceOutput, feeder: Feeder) -> None:
        """Called by the listener, in the event loop."""
        self.feeder = feeder
        self._gathered.append(output)
        self._has_finished |= output.finish_reason is not None
        self._news.set()

    def fail(self, reason: str) -> None:
        """Ends the stream after what has gathered. Without effect on one that has its finish_reason."""
        if not self._has_finished and self._error is None:
            self._error = reason
            self._news.set()

    def close(self) -> None:
        """What still comes is dropped; a router that has not come to the end is told to stop. Idempotent."""
        self._on_close()
        if self.feeder is not None and not self._has_finished:
            self.feeder.abort(self.request_id, self.attempt)

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> SequenceOutput:
        while not self._gathered:
            if self._has_finished:
                raise StopAsyncIteration
            if self._error is not None:
                raise StreamBrokenError(self._error)
            self._news.clear()
            await self._news.wait()
        gathered, self._gathered = self._gathered, []
        return merge_outputs(gathered)


def merge_outputs(outputs: Sequence[SequenceOutput]) -> SequenceOutput:
    """Consecutive outputs of one attempt as one. There must be at least one."""
    if len(outputs) == 1:
        return outputs[0]
    last = outputs[-1]
    prompt_logprobs = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    return SequenceOutput(
        request_id=last.request_id,
        attempt=last.attempt,
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        logprobs=_merge_logprobs(outputs),
        prompt_logprobs=prompt_logprobs[0] if prompt_logprobs else None,
        finish_reason=last.finish_reason,
        error=last.error,
        error_code=last.error_code,
        degraded=any(output.degraded for output in outputs),
        num_cached_tokens=max(output.num_cached_tokens for output in outputs),
        since_begin_s=outputs[0].since_begin_s,
    )


def _merge_logprobs(outputs: Sequence[SequenceOutput]) -> list[TokenLogprobs] | None:
    if all(output.logprobs is None for output in outputs):
        return None
    return [logprob for output in outputs for logprob in output.logprobs or ()]
