"""The body of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from cluster.front.generate_call import Origin
from cluster.front.openai.generation_request import GenerationRequest, NumLogprobs
from cluster.front.openai.request_fields import MAX_COUNT, Ignored, NotSupported, RequestModel, field_error

KINDS_OF_PARTS = {"image_url": "images", "input_audio": "sounds", "file": "files", "video_url": "videos"}


class ContentPart(RequestModel):
    type: Literal["text"]
    text: str

    @classmethod
    def check_raw(cls, data: dict[str, Any]) -> None:
        kind = data.get("type")
        if isinstance(kind, str) and kind != "text":
            what = KINDS_OF_PARTS.get(kind, "such parts")
            message = f"is of type {kind[:80]!r}: {what} are not supported yet, only text"
            raise field_error("unsupported_content", None, message)


def _form_of_content(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<parts>" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[ContentPart], Field(min_length=1, fail_fast=True), Tag("<parts>")],
    Discriminator(
        _form_of_content, custom_error_type="content", custom_error_message="must be a text or a list of parts"
    ),
]


class RequestMessage(RequestModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: Annotated[Any, Ignored()] = None
    tool_call_id: Annotated[Any, Ignored()] = None

    # What an answer carries when it is sent back as part of the conversation.
    tool_calls: Annotated[Any, NotSupported(neutral=([],))] = None
    function_call: Annotated[Any, NotSupported()] = None
    audio: Annotated[Any, NotSupported()] = None
    refusal: Annotated[Any, NotSupported()] = None
    annotations: Annotated[Any, NotSupported(neutral=([],))] = None

    @property
    def texts(self) -> list[str]:
        return [self.content] if isinstance(self.content, str) else [part.text for part in self.content]


class ChatRequest(GenerationRequest):
    origin: ClassVar[Origin] = Origin(protocol="http", method="/v1/chat/completions")

    core_names: ClassVar[Mapping[str, str]] = {
        "prompt": "messages",
        "logprobs": "top_logprobs",
        "max_tokens": "max_completion_tokens",
    }

    messages: Annotated[list[RequestMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = Field(
        None, description="Default: what is left of the longest sequence, at most 1024."
    )
    max_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = Field(
        None, description="The old name of max_completion_tokens."
    )
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = Field(None, description="Needs logprobs. -1: the whole vocabulary.")

    parallel_tool_calls: Annotated[Any, Ignored()] = None
    tools: Annotated[Any, NotSupported(neutral=([],))] = None
    tool_choice: Annotated[Any, NotSupported(neutral=("none", "auto"))] = None
    functions: Annotated[Any, NotSupported(neutral=([],))] = None
    function_call: Annotated[Any, NotSupported(neutral=("none", "auto"))] = None
    response_format: Annotated[Any, NotSupported(neutral=({"type": "text"},))] = None
    modalities: Annotated[Any, NotSupported(neutral=(["text"],))] = None
    audio: Annotated[Any, NotSupported()] = None
    prediction: Annotated[Any, NotSupported()] = None
    reasoning_effort: Annotated[Any, NotSupported()] = None
    verbosity: Annotated[Any, NotSupported()] = None
    web_search_options: Annotated[Any, NotSupported()] = None
    moderation: Annotated[Any, NotSupported()] = None
    prompt_cache_options: Annotated[Any, NotSupported()] = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise field_error("conflict", "top_logprobs", "needs logprobs to be true")
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise field_error("conflict", "max_tokens", "differs from max_completion_tokens, its new name")
        return self
