"""A Generate call and its answer as plain objects, whatever the protocol they travel by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.front.chat import ChatMessage
from cluster.front.journal import Delta
from router.messages import MissingExpertPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPrompt:
    """add_begin_of_text: put the model's begin-of-text token in front."""

    text: str
    add_begin_of_text: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrompt:
    token_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    messages: tuple[ChatMessage, ...]


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumedChoice:
    """Output that the client already holds. finished: its end, too."""

    token_ids: list[int]
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """By which protocol a call came, and what it called there: ``grpc Generate``, ``http /v1/completions``."""

    protocol: str
    method: str


GRPC_GENERATE = Origin(protocol="grpc", method="Generate")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """One Generate call as the client made it. sampling holds the fields it set, under the API's names.

    request_id is empty and seed None where the client leaves them to the gateway; resumed is by choice index.
    weights_version: of the tokens that are resumed, or None. stop: texts that end a choice, cut off from its text
    unless include_stop_str_in_output."""

    prompt: Prompt
    num_bytes: int
    n: int = 1
    sampling: Mapping[str, Any] = field(default_factory=dict)
    request_id: str = ""
    seed: int | None = None
    resumed: Mapping[int, ResumedChoice] = field(default_factory=dict)
    on_missing_expert: MissingExpertPolicy | None = None
    cache_salt: str = ""
    weights_version: int | None = None
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    origin: Origin = GRPC_GENERATE


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """completion_tokens: over all choices, resumed ones included. cached_tokens: of the prompt, in choice 0."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One message to the client. request_id, seed and weights_version: in the first; usage: in the last."""

    delta: Delta
    request_id: str = ""
    seed: int | None = None
    weights_version: int | None = None
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """What delta's tokens complete."""
        return self.delta.text
