"""From the bytes of a request to its model, or to an error that names the field."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from cluster.front.openai.api_error import ApiError
from cluster.front.openai.request_fields import RequestModel

MAX_SHOWN = 80
# How pydantic begins its sentences.
SUBJECT = re.compile(r"^\w+ should")
# Pydantic's kinds of error under OpenAI's codes; all others are a wrong value.
CODES = {"missing": "missing_required_parameter", "json_invalid": "invalid_json"}
OUR_KINDS = ("unknown_parameter", "unsupported_parameter", "unsupported_content", "conflict")

Model = TypeVar("Model", bound=RequestModel)


def parse(model: type[Model], body: bytes) -> Model:
    """Raises ApiError (400) for the first thing that is wrong."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _api_error(error.errors(include_url=False)[0]) from None


def _api_error(detail: Any) -> ApiError:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON in UTF-8: {context['error']}", code=CODES[kind])
    if kind == "model_type" and not detail["loc"]:
        return ApiError(400, f"the body must be a JSON object, not {_shown(detail['input'])}", code="invalid_type")
    field = context.get("field")
    param = path_of([*detail["loc"], *([] if field is None else [field])])
    code = kind if kind in OUR_KINDS else CODES.get(kind, "invalid_value")
    return ApiError(400, f"{param} {_sentence(kind, detail)}", param=param, code=code)


def _sentence(kind: str, detail: Any) -> str:
    if kind == "missing":
        return "is required"
    message = SUBJECT.sub("must", detail["msg"]).replace(" after validation", "")
    if kind in OUR_KINDS or ", not " in message:
        return message
    return f"{message}, not {_shown(detail['input'])}"


def _shown(value: Any) -> str:
    """Short, whatever the client has sent."""
    match value:
        case dict():
            return "an object"
        case list():
            return "an array"
        case str():
            text = repr(value[:MAX_SHOWN])
            return text if len(value) <= MAX_SHOWN else f"{text}..."
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case _:
            text = repr(value)
            return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def path_of(location: Sequence[str | int]) -> str:
    """As in messages[0].content. Names in angle brackets stand for the form of a field that may take several."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith(("<", "[")):
            # A name may be the client's, of any length.
            name = part if len(part) <= MAX_SHOWN else f"{part[:MAX_SHOWN]}..."
            path += f".{name}" if path else name
    return path
