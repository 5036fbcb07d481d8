"""What the models of requests are made of: strict fields, and those that OpenAI has and we do not serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from cluster.front.admission import MAX_LOGIT_BIASES, MAX_STOP_LENGTH, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS

MAX_TOKEN_ID = 2**32 - 1
MAX_COUNT = 2**31 - 1


def field_error(kind: str, field: str | None, message: str) -> PydanticCustomError:
    """What a validator of a whole object raises where one of its fields is to blame, or None: all of it.

    message: a sentence without its subject. See request_parsing.
    """
    # What pydantic takes is a template; in its context the message may hold braces.
    return PydanticCustomError(kind, "{message}", {"field": field, "message": message})


class RequestModel(BaseModel):
    """An object that a client sends. Nothing is coerced, nothing unknown is let through."""

    # What the core calls some of our fields.
    core_names: ClassVar[Mapping[str, str]] = {}

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _look_before(cls, data: Any) -> Any:
        """Names the first unknown field alone, where pydantic would list a million."""
        if isinstance(data, dict):
            cls.check_raw(data)
            for name in data:
                if name not in cls.model_fields:
                    raise field_error("unknown_parameter", name, "is not a field of this request")
        return data

    @classmethod
    def check_raw(cls, data: dict[str, Any]) -> None:
        """What must be said before any field is looked at. Raises PydanticCustomError."""


# eq: typing would take two that are equal for one, and 1 is equal to True.
@dataclass(frozen=True, slots=True, eq=False)
class NotSupported:
    """Annotates a field that OpenAI has and this service does not. Only None and the neutral values, which ask for
    nothing, are taken."""

    neutral: tuple[Any, ...] = ()

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.neutral], "description": "Not supported yet."}

    def _check(self, value: Any) -> Any:
        if value is None or any(type(value) is type(entry) and value == entry for entry in self.neutral):
            return value
        raise PydanticCustomError("unsupported_parameter", "is not supported yet")


@dataclass(frozen=True, slots=True)
class Ignored:
    """Annotates a field that clients send and that changes nothing here."""

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"description": "Taken and ignored."}


def ignored_names(model: type[RequestModel]) -> list[str]:
    """The fields of a model that are taken and ignored."""
    fields = model.model_fields.items()
    return [name for name, field in fields if any(isinstance(entry, Ignored) for entry in field.metadata)]


def _check_size(limit: int) -> BeforeValidator:
    """Counts the entries before each of a million is complained of."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            raise PydanticCustomError(
                "too_long", "must have at most {limit} entries, not {size}", {"limit": limit, "size": len(value)}
            )
        return value

    return BeforeValidator(check)


TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
# fail_fast: lists may be long, and one complaint will do.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
StopTokenIds = Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]
TokenIdName = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[
    dict[TokenIdName, Bias],
    Field(max_length=MAX_LOGIT_BIASES, json_schema_extra={"additionalProperties": False}),
    _check_size(MAX_LOGIT_BIASES),
]
