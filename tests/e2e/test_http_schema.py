"""schemathesis over the service's own OpenAPI document: requests that fit it and requests that do not, made by seeded
generators. Nothing is answered with a 5xx, what does not fit is refused, and answers are what the document says."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from conftest import Service, Tell
from http_calls import MODEL, base_url, send
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
NUM_EXAMPLES = 10
MAX_TOKENS = 2
MAX_CHOICES = 2


@pytest.fixture(scope="module")
def schema(service: Service) -> Any:
    response = send(service, "/openapi.json", method="GET")
    assert response.headers["content-type"] == "application/json"
    assert response.json()["servers"] == [{"url": f"/{service.app_name}"}]
    return schemathesis.openapi.from_dict(response.json())


def eased(body: Any) -> Any:
    """The same request, right or wrong as it was, but of the model that is served, and soon answered."""
    if not isinstance(body, dict):
        return body
    if isinstance(body.get("model"), str):
        body = {**body, "model": MODEL}
    limits = {"n": MAX_CHOICES, "max_tokens": MAX_TOKENS, "max_completion_tokens": MAX_TOKENS}
    for name, limit in limits.items():
        if type(body.get(name)) is int and body[name] > limit:
            body = {**body, name: limit}
    if "messages" in body and "prompt" not in body and body.get("max_tokens") is None:
        body = {"max_completion_tokens": MAX_TOKENS, **body}
    return body


def examine(service: Service, operation: Any, mode: GenerationMode) -> dict[int, int]:
    """How often each status came."""
    seen: dict[int, int] = {}

    @settings(
        max_examples=NUM_EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        case.body = eased(case.body)
        response = case.call(base_url=base_url(service))
        seen[response.status_code] = seen.get(response.status_code, 0) + 1
        case.validate_response(response, checks=CHECKS)

    run()
    return seen


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_requests_by_the_document_are_answered_as_it_says(
    service: Service, schema: Any, tell: Tell, path: str, mode: GenerationMode
) -> None:
    seen = examine(service, schema[path]["POST"], mode)
    tell(f"{seen}")
    assert max(seen) < 500
    if mode is GenerationMode.NEGATIVE:
        assert set(seen) <= {400, 404}
    else:
        assert 200 in seen


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{model}", "/health"])
def test_what_can_only_be_asked_is_answered_as_the_document_says(service: Service, schema: Any, path: str) -> None:
    assert set(examine(service, schema[path]["GET"], GenerationMode.POSITIVE)) <= {200, 404}
