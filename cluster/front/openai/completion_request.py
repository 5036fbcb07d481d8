"""The body of /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import Discriminator, Field, Tag, model_validator

from cluster.front.generate_call import Origin
from cluster.front.openai.generation_request import GenerationRequest, NumLogprobs
from cluster.front.openai.request_fields import MAX_COUNT, NotSupported, TokenIds, field_error

Text = Annotated[str, Field(min_length=1)]


def _form_of_prompt(value: Any) -> str | None:
    """By the first entry: the others must then be like it."""
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list) or not value:
        return None
    return {str: "<texts>", int: "<ids>", list: "<batch>"}.get(type(value[0]))


PromptField = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag("<batch>")],
    Discriminator(
        _form_of_prompt,
        custom_error_type="prompt",
        custom_error_message="must be a text or a list of token ids, not empty, or a list of either",
    ),
]


class CompletionRequest(GenerationRequest):
    origin: ClassVar[Origin] = Origin(protocol="http", method="/v1/completions")

    prompt: PromptField
    max_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = Field(
        None, description="Default 16. 0 is only for echo: the prompt comes back, and nothing after it."
    )
    echo: bool | None = Field(None, description="Put the prompt in front; with logprobs, its log probabilities, too.")
    logprobs: NumLogprobs | None = Field(
        None, description="0: of each token that was drawn; n: of the n most likely as well; -1: of all."
    )
    add_special_tokens: bool | None = Field(
        None, description="Default true: a text gets the model's begin-of-text token in front."
    )

    best_of: Annotated[Any, NotSupported(neutral=(1,))] = None
    suffix: Annotated[Any, NotSupported(neutral=("",))] = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        token_ids = [entry for entry in self.prompt if isinstance(entry, int)]
        return [token_ids] if token_ids else [entry for entry in self.prompt if not isinstance(entry, int)]

    @property
    def is_echo_only(self) -> bool:
        return self.max_tokens == 0

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.is_echo_only and not self.echo:
            raise field_error("conflict", "max_tokens", "must be at least 1 without echo, not 0")
        if self.echo and self.logprobs is not None and self.prompt_logprobs is not None:
            raise field_error("conflict", "prompt_logprobs", "is what echo and logprobs give already")
        if self.resume_token_ids is not None and (self.echo or len(self.prompts) > 1):
            raise field_error("conflict", "resume_token_ids", "is for one prompt and without echo")
        return self
