"""The Python client's values to protobuf messages and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import cast

from cluster.client_types import FinishReason, MissingExpertPolicy, Piece, Sampling, TokenLogprobs, Usage
from cluster.front.chat import ChatMessage, ContentPart, ImagePart
from cluster.v1 import generation_pb2

Prompt = str | Sequence[int] | Sequence[ChatMessage]

POLICIES: dict[MissingExpertPolicy, generation_pb2.OnMissingExpert.ValueType] = {
    "wait": generation_pb2.ON_MISSING_EXPERT_WAIT,
    "fail": generation_pb2.ON_MISSING_EXPERT_FAIL,
    "shared_only": generation_pb2.ON_MISSING_EXPERT_SHARED_ONLY,
}
FINISH_REASON_PREFIX = "FINISH_REASON_"


def set_prompt(
    request: generation_pb2.GenerateRequest | generation_pb2.TokenizeRequest, prompt: str | Sequence[ChatMessage]
) -> None:
    """Fills the request's prompt with a text or a chat."""
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.chat.messages.extend(_chat_message(message) for message in prompt)


def generate_request(prompt: Prompt, sampling: Sampling) -> generation_pb2.GenerateRequest:
    """A request of prompt and sampling alone.

    Raises TypeError or ValueError for a value that its field cannot hold.
    """
    request = generation_pb2.GenerateRequest(sampling=_sampling_params(sampling))
    if isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], ChatMessage)):
        set_prompt(request, cast("str | Sequence[ChatMessage]", prompt))
    else:
        request.token_ids.CopyFrom(generation_pb2.TokenIds(ids=cast("Sequence[int]", prompt)))
    return request


def policy_value(policy: MissingExpertPolicy) -> generation_pb2.OnMissingExpert.ValueType:
    """Raises ValueError for an unknown policy."""
    if policy not in POLICIES:
        raise ValueError(f"on_missing_expert must be one of {', '.join(POLICIES)}, not {policy!r}")
    return POLICIES[policy]


def piece_of(response: generation_pb2.GenerateResponse) -> Piece:
    return Piece(
        choice_index=response.choice_index,
        token_ids=tuple(response.token_ids),
        text=response.text,
        logprobs=tuple(_token_logprobs(entry) for entry in response.logprobs),
        prompt_logprobs=tuple(_token_logprobs(entry) for entry in response.prompt_logprobs),
        finish_reason=_finish_reason(response.finish_reason),
        degraded=response.degraded,
        usage=_usage(response.usage) if response.HasField("usage") else None,
    )


def _sampling_params(sampling: Sampling) -> generation_pb2.SamplingParams:
    if isinstance(sampling.stop, str):
        raise TypeError(f"stop must be a tuple of strings, not the string {sampling.stop!r}")
    values = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
    return generation_pb2.SamplingParams(**{name: value for name, value in values.items() if value is not None})


def _chat_message(message: ChatMessage) -> generation_pb2.ChatMessage:
    return generation_pb2.ChatMessage(role=message.role, content=[_content_part(part) for part in message.content])


def _content_part(part: ContentPart) -> generation_pb2.ContentPart:
    if not isinstance(part, ImagePart):
        return generation_pb2.ContentPart(text=part.text)
    image = generation_pb2.Image(url=part.url) if part.url else generation_pb2.Image(data=part.data)
    return generation_pb2.ContentPart(image=image)


def _token_logprobs(entry: generation_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        token_id=entry.token_id,
        logprob=entry.logprob,
        top=tuple(zip(entry.top_token_ids, entry.top_logprobs, strict=True)),
    )


def _finish_reason(value: generation_pb2.FinishReason.ValueType) -> FinishReason | None:
    if value == generation_pb2.FINISH_REASON_UNSPECIFIED:
        return None
    name = generation_pb2.FinishReason.Name(value)
    return cast("FinishReason", name.removeprefix(FINISH_REASON_PREFIX).lower())


def _usage(usage: generation_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )
