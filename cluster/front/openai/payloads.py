"""What the OpenAI API answers, as it stands in JSON. Fields that are UNSET are left away.

Beyond OpenAI's own: seed, degraded, token_ids, prompt_token_ids, prompt_logprobs (see the README of cluster).
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

FinishReason = Literal["stop", "length"]


class Payload(msgspec.Struct, frozen=True, kw_only=True):
    pass


class PromptTokensDetails(Payload, frozen=True, kw_only=True):
    cached_tokens: int


class UsagePayload(Payload, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Payload, frozen=True, kw_only=True):
    """bytes: null where the token has no text."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob, frozen=True, kw_only=True):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Payload, frozen=True, kw_only=True):
    content: list[TokenLogprob]
    refusal: None = None


class PromptTokenLogprob(Payload, frozen=True, kw_only=True):
    """rank: from 1; null where the token is not among the most likely ones that were asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


# One for each token of the prompt, by token id: the token itself and the most likely ones. The first has none.
PromptLogprobs = list[dict[str, PromptTokenLogprob] | None]


class Choice(Payload, frozen=True, kw_only=True):
    """degraded: true where an expert was missing and the shared expert alone stood in."""

    index: int
    degraded: bool | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatDelta(Payload, frozen=True, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str


class ChatChunkChoice(Choice, frozen=True, kw_only=True):
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class AnswerMessage(Payload, frozen=True, kw_only=True):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Choice, frozen=True, kw_only=True):
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class CompletionLogprobs(Payload, frozen=True, kw_only=True):
    """One entry per token in each list. text_offset: where the token's text begins in the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChunkChoice(Choice, frozen=True, kw_only=True):
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionChoice(Choice, frozen=True, kw_only=True):
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Answer(Payload, frozen=True, kw_only=True):
    """seed: what brings the same tokens again; left away where several prompts have each their own."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    seed: int | UnsetType = UNSET


class ChatCompletion(Answer, frozen=True, kw_only=True):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: UsagePayload
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(Answer, frozen=True, kw_only=True):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: UsagePayload | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(Answer, frozen=True, kw_only=True):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: UsagePayload


class CompletionChunk(Answer, frozen=True, kw_only=True):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChunkChoice]
    usage: UsagePayload | UnsetType | None = UNSET


class ModelCard(Payload, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Payload, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeAnswer(Payload, frozen=True, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(Payload, frozen=True, kw_only=True):
    prompt: str
