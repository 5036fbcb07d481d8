"""The operations of the OpenAI API, from the bytes of a request to its response. HTTP is Exchange's matter."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import msgspec

from cluster.front.errors import ServiceError
from cluster.front.generate_call import TextPrompt
from cluster.front.generator import MAX_INLINE_BYTES, Generator
from cluster.front.openai.api_error import ApiError, argument_error
from cluster.front.openai.chat_request import ChatRequest
from cluster.front.openai.completion_request import CompletionRequest
from cluster.front.openai.exchange import Exchange
from cluster.front.openai.generation import Generation
from cluster.front.openai.generation_request import GenerationRequest
from cluster.front.openai.payloads import DetokenizeAnswer, ModelList, Payload, TokenizeAnswer
from cluster.front.openai.planning import Planner
from cluster.front.openai.request_fields import RequestModel
from cluster.front.openai.request_parsing import parse
from cluster.front.openai.token_texts import TokenTexts
from cluster.front.openai.tokenize_request import DetokenizeRequest, TokenizeRequest
from cluster.front.openai.translation import chat_prompt

logger = logging.getLogger("arriero.gateway")

Asked = TypeVar("Asked", ChatRequest, CompletionRequest)
Result = TypeVar("Result")


class OpenAiApi:
    """Every operation raises ApiError for what it refuses. max_request_bytes: of a body."""

    def __init__(self, planner: Planner, *, max_request_bytes: int) -> None:
        self._planner = planner
        self._model = planner.model
        self._generator: Generator = planner.generator
        self._tokens = TokenTexts(planner.tokenizer)
        self._warned_of: set[str] = set()
        self.max_request_bytes = max_request_bytes

    async def chat_completions(self, exchange: Exchange, body: bytes) -> None:
        await self._generate(exchange, body, ChatRequest, self._planner.chat)

    async def completions(self, exchange: Exchange, body: bytes) -> None:
        await self._generate(exchange, body, CompletionRequest, self._planner.completion)

    async def models(self, exchange: Exchange, body: bytes) -> None:
        await _respond(exchange, ModelList(data=[self._model.card()]))

    async def model(self, exchange: Exchange, body: bytes) -> None:
        self._check_model(exchange.path_parameters["model"])
        await _respond(exchange, self._model.card())

    async def tokenize(self, exchange: Exchange, body: bytes) -> None:
        request = parse(TokenizeRequest, body)
        self._check_model(request.model)
        with _mistakes_named(request):
            token_ids = await _computed(len(body), lambda: self._encode(request))
        names = [self._tokens.text(token_id) for token_id in token_ids] if request.return_token_strs else None
        max_model_len = self._model.max_model_len
        await _respond(
            exchange,
            TokenizeAnswer(count=len(token_ids), max_model_len=max_model_len, tokens=token_ids, token_strs=names),
        )

    async def detokenize(self, exchange: Exchange, body: bytes) -> None:
        request = parse(DetokenizeRequest, body)
        self._check_model(request.model)
        keep = request.skip_special_tokens is False
        with _mistakes_named(request):
            text = await _computed(len(body), lambda: self._generator.decode(request.tokens, keep_special_tokens=keep))
        await _respond(exchange, DetokenizeAnswer(prompt=text))

    async def _generate(
        self, exchange: Exchange, body: bytes, kind: type[Asked], plan: Callable[..., Generation]
    ) -> None:
        try:
            generation = await self._planned(exchange, body, kind, plan)
        except ApiError as error:
            self._generator.refuse(kind.origin, ServiceError(error.service_code, error.message))
            raise
        await generation.answer(exchange, self._generator)

    async def _planned(
        self, exchange: Exchange, body: bytes, kind: type[Asked], plan: Callable[..., Generation]
    ) -> Generation:
        request_id = exchange.request_id()
        request = parse(kind, body)
        self._check_model(request.model)
        self._warn_of_ignored(request)
        with _mistakes_named(request):
            return await _computed(len(body), lambda: plan(request, request_id=request_id, num_bytes=len(body)))

    def _encode(self, request: TokenizeRequest) -> list[int]:
        if request.messages is not None:
            return self._generator.encode(chat_prompt(request.messages))
        add_begin = request.add_special_tokens is not False
        return self._generator.encode(TextPrompt(text=request.prompt or "", add_begin_of_text=add_begin))

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model.name:
            message = f"model {name[:200]!r} does not exist, this service has {self._model.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _warn_of_ignored(self, request: GenerationRequest) -> None:
        for name in request.ignored_fields:
            if name not in self._warned_of:
                self._warned_of.add(name)
                logger.warning("requests set %s, which this service ignores", name)


async def _respond(exchange: Exchange, payload: Payload) -> None:
    await exchange.respond(msgspec.json.encode(payload))


async def _computed(num_bytes: int, compute: Callable[[], Result]) -> Result:
    """In a thread where it may take long: the event loop has other streams to feed."""
    return await asyncio.to_thread(compute) if num_bytes > MAX_INLINE_BYTES else compute()


@contextmanager
def _mistakes_named(request: RequestModel) -> Iterator[None]:
    """What the core calls a wrong value is the client's mistake."""
    try:
        yield
    except ValueError as error:
        raise argument_error(str(error), request) from None
