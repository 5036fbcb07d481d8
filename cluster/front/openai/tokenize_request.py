"""The bodies of /tokenize and /detokenize, in vLLM's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from cluster.front.openai.chat_request import RequestMessage
from cluster.front.openai.request_fields import RequestModel, TokenId, field_error


class TokenizeRequest(RequestModel):
    """A text or a chat."""

    core_names: ClassVar[Mapping[str, str]] = {"text": "prompt"}

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[RequestMessage], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = Field(
        None, description="Default true: a text gets the model's begin-of-text token in front."
    )
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise field_error("conflict", "prompt", "is required, or messages, and not both")
        if self.messages is not None and self.add_special_tokens is not None:
            raise field_error("conflict", "add_special_tokens", "is for prompt only")
        return self


class DetokenizeRequest(RequestModel):
    core_names: ClassVar[Mapping[str, str]] = {"token_ids": "tokens"}

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
    skip_special_tokens: bool | None = Field(None, description="Default true: special tokens have no text.")
