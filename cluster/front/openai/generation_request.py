"""What chat and text completions have in common: how many choices, how tokens are drawn, what comes back."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Discriminator, Field, Tag, model_validator

from cluster.front.generate_call import Origin
from cluster.front.openai.request_fields import (
    MAX_COUNT,
    Ignored,
    LogitBias,
    NotSupported,
    RequestModel,
    StopString,
    StopStrings,
    StopTokenIds,
    TokenId,
    field_error,
    ignored_names,
)
from router.messages import MissingExpertPolicy
from router.sampling_params import MAX_REPETITION_PENALTY, MAX_SEED, MIN_REPETITION_PENALTY


def _form_of_stop(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<texts>" if isinstance(value, list) else None


Stop = Annotated[
    Annotated[StopString, Tag("<text>")] | Annotated[StopStrings, Tag("<texts>")],
    Discriminator(_form_of_stop, custom_error_type="stop", custom_error_message="must be a text or a list of texts"),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
NumLogprobs = Annotated[int, Field(ge=-1, le=MAX_COUNT)]


class StreamOptions(RequestModel):
    include_usage: bool | None = Field(default=None, description="Send one more message at the end, with the usage.")
    continuous_usage_stats: bool | None = Field(
        default=None, description="With include_usage: the usage so far in every message, too."
    )
    include_obfuscation: Annotated[Any, NotSupported(neutral=(False,))] = None


class ResumedChoice(RequestModel):
    """A part of one choice that the client has received already."""

    index: int = Field(ge=0, le=MAX_COUNT)
    token_ids: Annotated[list[TokenId], Field(fail_fast=True)]
    finished: bool = Field(False, description="The client has seen the end of this choice.")


class GenerationRequest(RequestModel):
    origin: ClassVar[Origin]

    model: str | None = Field(None, description="Default: the only model that is served.")

    n: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: Stop | None = None

    # vLLM's names for what OpenAI does not have.
    top_k: Annotated[int, Field(ge=-1, le=MAX_COUNT, description="0 and -1: all.")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: StopTokenIds | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: Annotated[Any, NotSupported(neutral=(True,))] = None
    prompt_logprobs: NumLogprobs | None = Field(None, description="Not with stream. -1: the whole vocabulary.")
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = Field(
        None, description="In log probabilities, name tokens token_id:N instead of by their text."
    )
    cache_salt: Annotated[str, Field(max_length=256)] | None = None

    # Our own.
    on_missing_expert: MissingExpertPolicy | None = Field(
        None, description="When no living shard has an expert. Default: the deployment's policy."
    )
    resume_token_ids: Annotated[list[ResumedChoice], Field(max_length=1024, fail_fast=True)] | None = Field(
        None,
        description="Goes on with a broken stream: the same request with what has come of each choice. Needs seed.",
    )

    user: Annotated[Any, Ignored()] = None
    metadata: Annotated[Any, Ignored()] = None
    store: Annotated[Any, Ignored()] = None
    service_tier: Annotated[Any, Ignored()] = None
    safety_identifier: Annotated[Any, Ignored()] = None
    prompt_cache_key: Annotated[Any, Ignored()] = None
    prompt_cache_retention: Annotated[Any, Ignored()] = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def ignored_fields(self) -> list[str]:
        """What the client has set and we ignore."""
        return [name for name in ignored_names(type(self)) if getattr(self, name) is not None]

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise field_error("conflict", "stream_options", "is only for stream")
        if self.stream and self.prompt_logprobs is not None:
            raise field_error("conflict", "prompt_logprobs", "is not possible with stream")
        if self.resume_token_ids is not None:
            self._check_resumption(self.resume_token_ids)
        return self

    def _check_resumption(self, choices: list[ResumedChoice]) -> None:
        if not self.stream:
            raise field_error("conflict", "resume_token_ids", "is only for stream")
        if self.seed is None:
            raise field_error("conflict", "resume_token_ids", "needs the seed that the stream began with")
        if len({choice.index for choice in choices}) < len(choices):
            raise field_error("conflict", "resume_token_ids", "must name each index once")
