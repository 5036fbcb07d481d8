"""The operations of the HTTP API: where each is found, what it takes, what it answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from cluster.front.openai.api import OpenAiApi
from cluster.front.openai.chat_request import ChatRequest
from cluster.front.openai.completion_request import CompletionRequest
from cluster.front.openai.exchange import Exchange
from cluster.front.openai.payloads import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    DetokenizeAnswer,
    ModelCard,
    ModelList,
    Payload,
    TokenizeAnswer,
)
from cluster.front.openai.request_fields import RequestModel
from cluster.front.openai.tokenize_request import DetokenizeRequest, TokenizeRequest

REFUSED = {400: "What is wrong with the request, and where.", 404: "The model is not served here."}
OF_BODIES = {408: "The body did not come in time.", 413: "The body is too large."}
OF_GENERATION = {429: "The queue is full: try again.", 503: "A part of the service is being rebuilt: try again."}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """request: None where there is no body. event: what a stream's messages hold, where there may be a stream.
    errors: by status code, with the reason."""

    path: str
    method: str
    name: str
    summary: str
    handler: Callable[[OpenAiApi, Exchange, bytes], Awaitable[None]]
    answer: type[Payload]
    request: type[RequestModel] | None = None
    event: type[Payload] | None = None
    errors: Mapping[int, str] = field(default_factory=dict)


OPERATIONS = (
    Operation(
        path="/v1/chat/completions",
        method="POST",
        name="createChatCompletion",
        summary="The assistant's next message.",
        handler=OpenAiApi.chat_completions,
        request=ChatRequest,
        answer=ChatCompletion,
        event=ChatCompletionChunk,
        errors={**REFUSED, **OF_BODIES, **OF_GENERATION},
    ),
    Operation(
        path="/v1/completions",
        method="POST",
        name="createCompletion",
        summary="What follows a text, or token ids, or several of either.",
        handler=OpenAiApi.completions,
        request=CompletionRequest,
        answer=Completion,
        event=CompletionChunk,
        errors={**REFUSED, **OF_BODIES, **OF_GENERATION},
    ),
    Operation(
        path="/v1/models",
        method="GET",
        name="listModels",
        summary="The one model that is served.",
        handler=OpenAiApi.models,
        answer=ModelList,
    ),
    Operation(
        path="/v1/models/{model:path}",
        method="GET",
        name="retrieveModel",
        summary="The model, by its name.",
        handler=OpenAiApi.model,
        answer=ModelCard,
        errors={404: REFUSED[404]},
    ),
    Operation(
        path="/tokenize",
        method="POST",
        name="tokenize",
        summary="The token ids that a completion would make of a text or a chat.",
        handler=OpenAiApi.tokenize,
        request=TokenizeRequest,
        answer=TokenizeAnswer,
        errors={**REFUSED, **OF_BODIES},
    ),
    Operation(
        path="/detokenize",
        method="POST",
        name="detokenize",
        summary="The text of token ids.",
        handler=OpenAiApi.detokenize,
        request=DetokenizeRequest,
        answer=DetokenizeAnswer,
        errors={**REFUSED, **OF_BODIES},
    ),
)
