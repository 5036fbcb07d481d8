"""The OpenAPI document says what is there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.routing import Route

from cluster.front.http_api import build_http_api
from cluster.front.openai.chat_request import ChatRequest
from cluster.front.openai.completion_request import CompletionRequest
from cluster.front.openai.openapi import openapi_document
from cluster.front.openai.operations import OPERATIONS
from cluster.front.openai.tokenize_request import DetokenizeRequest, TokenizeRequest

# Told of elsewhere, or not for clients of the API.
UNDESCRIBED = {"/openapi.json", "/metrics"}


@pytest.fixture(scope="module")
def document() -> Any:
    """As a client gets it."""
    return json.loads(json.dumps(openapi_document(service_version="1", root_path="/app")))


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_route_is_described_and_none_that_is_not_there(document: Any) -> None:
    routes = [route for route in build_http_api().routes if isinstance(route, Route)]
    there = {(route.path.replace(":path}", "}"), method.lower()) for route in routes for method in route.methods or ()}
    described = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert described <= there
    assert {(path, method) for path, method in there if path not in UNDESCRIBED and method != "head"} == described


def test_every_reference_leads_somewhere(document: Any) -> None:
    found = set(references(document))
    assert found
    assert {reference.rpartition("/")[2] for reference in found} <= set(document["components"]["schemas"])


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest])
def test_a_request_has_the_fields_of_its_model_and_no_others(document: Any, model: Any) -> None:
    schema = document["components"]["schemas"][model.__name__]
    assert set(schema["properties"]) == set(model.model_fields)
    assert schema["additionalProperties"] is False


def test_errors_that_pass_say_when_to_come_again(document: Any) -> None:
    responses = document["paths"]["/v1/completions"]["post"]["responses"]
    assert {status for status, response in responses.items() if "Retry-After" in response.get("headers", {})} == {
        "429",
        "503",
    }
    assert "422" not in responses


def test_every_operation_has_a_name_of_its_own() -> None:
    names = [operation.name for operation in OPERATIONS]
    assert len(set(names)) == len(names)


def test_the_document_names_the_place_of_the_application(document: Any) -> None:
    assert document["servers"] == [{"url": "/app"}]
    assert openapi_document(service_version="1", root_path="")["servers"] == [{"url": "/"}]
