"""What the Python client takes and gives: plain values, no protobufs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]
MissingExpertPolicy = Literal["wait", "fail", "shared_only"]


class ArrieroError(Exception):
    """The service refused a call or could not be reached. code is gRPC's name, as "INVALID_ARGUMENT"."""

    def __init__(self, code: str, details: str) -> None:
        super().__init__(f"{code}: {details}")
        self.code = code
        self.details = details


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. None leaves a field to the service; see SamplingParams in generation.proto."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    ignore_eos: bool | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] | None = None
    include_stop_str_in_output: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Natural logs, of the model's own distribution. top is sorted, most likely first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """completion_tokens: over all choices, resumed ones included. cached_tokens: of the prompt."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What follows the previous piece of the same choice.

    finish_reason: in the choice's last piece. usage: in the stream's last piece. degraded: an expert was
    missing for these tokens or for earlier ones. logprobs: one per token id, where asked for.
    prompt_logprobs: once, one per prompt token from the second on, where asked for.
    """

    choice_index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    degraded: bool = False
    usage: Usage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often to try again before giving up, and how long to wait before each try.

    max_tries: tries in a row that bring nothing new; any progress starts the count again. The wait doubles
    from initial_backoff_s up to max_backoff_s. Raises ValueError naming the field and its value.
    """

    max_tries: int = 12
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 5.0

    def __post_init__(self) -> None:
        if self.max_tries < 1:
            raise ValueError(f"max_tries must be at least 1, not {self.max_tries}")
        if not 0 <= self.initial_backoff_s <= self.max_backoff_s:
            raise ValueError(
                f"initial_backoff_s must be between 0 and max_backoff_s {self.max_backoff_s}, "
                f"not {self.initial_backoff_s}"
            )

    def backoff_s(self, num_failures: int) -> float:
        """The wait after so many failures in a row, of which there is at least one."""
        return min(self.max_backoff_s, self.initial_backoff_s * 2.0 ** min(num_failures - 1, 64))
