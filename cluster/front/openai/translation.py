"""Requests of the OpenAI API as calls of the generator. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.front.chat import ChatMessage, TextPart
from cluster.front.generate_call import ChatPrompt, GenerateCall, Prompt, ResumedChoice, TextPrompt, TokenPrompt
from cluster.front.openai.chat_request import ChatRequest, RequestMessage
from cluster.front.openai.completion_request import CompletionRequest
from cluster.front.openai.generation_request import GenerationRequest

DEFAULT_COMPLETION_TOKENS = 16
# The same field under the same name: of the request, and of the sampling.
SAME_NAMES = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "ignore_eos",
    "prompt_logprobs",
)
# OpenAI's newer name for instructions; the model knows one.
ROLES = {"developer": "system"}


def chat_prompt(messages: Sequence[RequestMessage]) -> ChatPrompt:
    return ChatPrompt(
        messages=tuple(
            ChatMessage(
                role=ROLES.get(message.role, message.role), content=tuple(TextPart(text=text) for text in message.texts)
            )
            for message in messages
        )
    )


def completion_prompts(request: CompletionRequest) -> list[Prompt]:
    add_begin = request.add_special_tokens is not False
    return [
        TextPrompt(text=prompt, add_begin_of_text=add_begin)
        if isinstance(prompt, str)
        else TokenPrompt(token_ids=prompt)
        for prompt in request.prompts
    ]


def chat_sampling(request: ChatRequest) -> dict[str, Any]:
    """Under the generator's names, what the client has set."""
    sampling = _sampling(request)
    max_tokens = request.max_completion_tokens or request.max_tokens
    if max_tokens is not None:
        sampling["max_tokens"] = max_tokens
    if request.logprobs:
        sampling["logprobs"] = request.top_logprobs or 0
    return sampling


def completion_sampling(request: CompletionRequest) -> dict[str, Any]:
    """Where only the prompt is to come back, one token is generated, to be thrown away."""
    sampling = _sampling(request)
    max_tokens = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    sampling["max_tokens"] = max(1, max_tokens)
    if request.logprobs is not None:
        sampling["logprobs"] = request.logprobs
        if request.echo:
            sampling["prompt_logprobs"] = request.logprobs
    return sampling


def _sampling(request: GenerationRequest) -> dict[str, Any]:
    sampling = {name: getattr(request, name) for name in SAME_NAMES if getattr(request, name) is not None}
    if request.top_k is not None:
        sampling["top_k"] = max(0, request.top_k)
    if request.stop_token_ids is not None:
        sampling["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.logit_bias is not None:
        sampling["logit_bias"] = {int(token_id): bias for token_id, bias in request.logit_bias.items()}
    return sampling


def generate_call(
    request: GenerationRequest,
    prompt: Prompt,
    sampling: dict[str, Any],
    *,
    request_id: str,
    seed: int,
    num_bytes: int,
    weights_version: int | None = None,
) -> GenerateCall:
    return GenerateCall(
        prompt=prompt,
        num_bytes=num_bytes,
        n=request.num_choices,
        sampling=sampling,
        request_id=request_id,
        seed=seed,
        weights_version=weights_version,
        resumed={
            choice.index: ResumedChoice(token_ids=choice.token_ids, finished=choice.finished)
            for choice in request.resume_token_ids or ()
        },
        on_missing_expert=request.on_missing_expert,
        cache_salt=request.cache_salt or "",
        stop=request.stop_strings,
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        origin=type(request).origin,
    )
