"""A generation that is planned, carried out: all its prompts at once, its answer as a stream or whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from cluster.front.errors import ServiceError, StatusCode
from cluster.front.generate_call import Chunk, GenerateCall
from cluster.front.generator import Generator
from cluster.front.openai.answer_form import AnswerForm
from cluster.front.openai.api_error import of_service_error
from cluster.front.openai.events import DONE, event
from cluster.front.openai.exchange import Exchange
from cluster.front.openai.generation_request import GenerationRequest, StreamOptions
from cluster.front.openai.merged_streams import merged
from cluster.front.openai.payloads import UsagePayload
from cluster.front.openai.usage_tally import UsageTally

NumberedChunks = AsyncGenerator[tuple[int, Chunk]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """calls: one for each prompt. form, tally: new ones."""

    request: GenerationRequest
    calls: list[GenerateCall]
    form: AnswerForm[Any]
    tally: UsageTally

    async def answer(self, exchange: Exchange, generator: Generator) -> None:
        """Raises ApiError, maybe after a part of a stream. Leaving it aborts what still runs."""
        try:
            async with aclosing(merged(self._streams(generator))) as chunks:
                await (self._stream if self.request.stream else self._respond)(exchange, chunks)
        except ServiceError as error:
            raise of_service_error(error, self.request) from None

    def _streams(self, generator: Generator) -> list[AsyncGenerator[Chunk]]:
        if len(self.calls) == 1:
            return [generator.generate(self.calls[0])]
        return [_of_one_prompt(generator, call, index) for index, call in enumerate(self.calls)]

    async def _respond(self, exchange: Exchange, chunks: NumberedChunks) -> None:
        pieces: list[Any] = []
        async for prompt_index, chunk in chunks:
            self.tally.add(chunk)
            pieces += self.form.pieces_of(prompt_index, chunk)
        await exchange.respond(msgspec.json.encode(self.form.whole(pieces, self.tally.whole())))

    async def _stream(self, exchange: Exchange, chunks: NumberedChunks) -> None:
        """The response begins with the first token: until then an error has a status code of its own."""
        options = self.request.stream_options or StreamOptions()
        is_first = True
        async for prompt_index, chunk in chunks:
            self.tally.add(chunk)
            for piece in self.form.pieces_of(prompt_index, chunk):
                message = self.form.message([piece], self._usage_shown(options), is_first=is_first)
                await exchange.send_events(event(msgspec.json.encode(message)))
                is_first = False
        end = DONE
        if options.include_usage:
            message = self.form.message([], self.tally.whole(), is_first=False)
            end = event(msgspec.json.encode(message)) + DONE
        await exchange.send_events(end, more=False)

    def _usage_shown(self, options: StreamOptions) -> UsagePayload | UnsetType | None:
        """In all messages but the last."""
        if not options.include_usage:
            return UNSET
        return self.tally.so_far() if options.continuous_usage_stats else None


async def _of_one_prompt(generator: Generator, call: GenerateCall, index: int) -> AsyncGenerator[Chunk]:
    """What is wrong with one prompt of several is told with its number."""
    try:
        async with aclosing(generator.generate(call)) as chunks:
            async for chunk in chunks:
                yield chunk
    except ServiceError as error:
        if error.code is not StatusCode.INVALID_ARGUMENT or not error.message.startswith("prompt"):
            raise
        raise ServiceError(error.code, f"prompt[{index}]{error.message.removeprefix('prompt')}") from None
