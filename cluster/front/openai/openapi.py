"""The OpenAPI document: the requests' schemas by pydantic, the answers' by msgspec, from the types that serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema

from cluster.front.openai.api_error import RETRIED, ErrorBody
from cluster.front.openai.operations import OPERATIONS, Operation
from cluster.front.openai.payloads import Payload

# The first with a word for streams.
VERSION = "3.2.0"
SCHEMAS = "#/components/schemas"
INTERNAL = "An error of the service."
DESCRIPTION = (
    "OpenAI's API, with vLLM's names for what it lacks. Every error has OpenAI's form. Every response carries the "
    "request's X-Request-Id, or one of the service's own."
)


def openapi_document(*, service_version: str, root_path: str) -> dict[str, Any]:
    """root_path: where the application is mounted, empty for /."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        path = operation.path.replace(":path}", "}")
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation)
    paths["/health"] = {"get": _health()}
    return {
        "openapi": VERSION,
        "info": {"title": "Arriero", "version": service_version, "description": DESCRIPTION},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {"schemas": _schemas()},
    }


def _operation(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {"operationId": operation.name, "summary": operation.summary}
    if "{model" in operation.path:
        described["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if operation.request is not None:
        content = {"application/json": {"schema": _reference(operation.request)}}
        described["requestBody"] = {"required": True, "content": content}
    errors = {str(status): _error(status, reason) for status, reason in {**operation.errors, 500: INTERNAL}.items()}
    described["responses"] = {"200": _answer(operation), **errors}
    return described


def _answer(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _reference(operation.answer)}}
    description = "The answer."
    if operation.event is not None:
        content["text/event-stream"] = {"itemSchema": _event(operation.event)}
        description = "The answer; with stream, its messages as server-sent events, and [DONE]."
    return {"description": description, "content": content}


def _event(message: type[Payload]) -> dict[str, Any]:
    """An error in the middle of a stream is its last event."""
    payload = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_reference(message), _reference(ErrorBody)]},
    }
    return {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [payload, {"const": "[DONE]"}]}}}


def _error(status: int, reason: str) -> dict[str, Any]:
    described: dict[str, Any] = {
        "description": reason,
        "content": {"application/json": {"schema": _reference(ErrorBody)}},
    }
    if status in RETRIED:
        described["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return described


def _health() -> dict[str, Any]:
    return {
        "operationId": "health",
        "summary": "Whether requests can be served.",
        "responses": {"200": {"description": "They can."}, "503": {"description": "Not now: no router is ready."}},
    }


def _schemas() -> Mapping[str, Any]:
    requests = [(operation.request, "validation") for operation in OPERATIONS if operation.request is not None]
    _, definitions = models_json_schema(requests, ref_template=f"{SCHEMAS}/{{model}}")  # type: ignore[arg-type]
    answers = [kind for operation in OPERATIONS for kind in (operation.answer, operation.event) if kind is not None]
    _, components = msgspec.json.schema_components([*answers, ErrorBody], ref_template=f"{SCHEMAS}/{{name}}")
    return {**definitions["$defs"], **components}


def _reference(kind: type) -> dict[str, str]:
    return {"$ref": f"{SCHEMAS}/{kind.__name__}"}
