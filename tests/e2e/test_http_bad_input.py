"""Whatever comes in by HTTP: a clear 4xx in OpenAI's shape, nothing of the inside in it, and a service that goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Service
from http_calls import MODEL, Response, send
from test_bad_input import INSIDE, pids_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
GOOD = {"model": MODEL, "prompt": "Hello", "seed": 1, "max_tokens": 8, "logprobs": 1}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def good_answer(service: Service) -> Any:
    return answer_of(service)


@pytest.fixture(scope="module", autouse=True)
def same_processes(service: Service) -> Iterator[None]:
    before = pids_of(service)
    yield
    assert pids_of(service) == before


@pytest.fixture(autouse=True)
def unharmed(service: Service, good_answer: Any) -> Iterator[None]:
    """After every test a good request has the same answer."""
    yield
    assert answer_of(service) == good_answer


def answer_of(service: Service) -> Any:
    response = send(service, COMPLETIONS, json.dumps(GOOD).encode())
    assert response.status == 200
    return response.json()["choices"]


def refusal(response: Response, status: int) -> Any:
    """The error object of a response that must be a refusal."""
    assert response.status == status
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    text = response.body.decode()
    assert len(text) < 1000
    assert not INSIDE.search(text), text
    body = json.loads(text)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "invalid_request_error"
    return body["error"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"Hello", b'{"prompt": "\xff\xfe"}', b'{"a":' + b"[" * 10**6, b'{"n": ' + b"9" * 10**6 + b"}", b"\x00"],
    ids=["empty", "cut off", "no JSON", "invalid UTF-8", "deeply nested", "a number of a million digits", "NUL"],
)
def test_what_is_not_json_is_refused(service: Service, body: bytes) -> None:
    for path in (CHAT, COMPLETIONS, "/tokenize", "/detokenize"):
        assert "not JSON" in refusal(send(service, path, body), 400)["message"], path


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": ["x", IMAGE]}]}, "messages[0].content[0]"),
        (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
        (CHAT, {"messages": HELLO, "tools": [{}]}, "tools"),
        (CHAT, {"messages": HELLO, "color": "red"}, "color"),
        (CHAT, {"messages": HELLO, "temperature": "hot"}, "temperature"),
        (CHAT, {"messages": "Hello"}, "messages"),
        (CHAT, {"messages": HELLO, "n": 10**9}, "n"),
        (CHAT, {"messages": HELLO, "n": 10**100}, "n"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 10_000}]}, "messages"),
        (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (COMPLETIONS, {"prompt": [5, 512]}, "prompt"),
        (COMPLETIONS, {"prompt": ["x"] * 65}, "prompt"),
        (COMPLETIONS, {"prompt": [5] * 10**6}, "prompt"),
        (COMPLETIONS, {"prompt": "x", "temperature": float("nan")}, "temperature"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"600": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "x", "stop_token_ids": [512]}, "stop_token_ids"),
        (COMPLETIONS, {"prompt": "x", **{f"field{index}": 0 for index in range(10**5)}}, "field0"),
        ("/detokenize", {"tokens": [512]}, "tokens"),
        ("/tokenize", {"prompt": ""}, "prompt"),
    ],
)
def test_a_bad_field_is_refused_by_its_name(service: Service, path: str, fields: Any, param: str) -> None:
    error = refusal(send(service, path, json.dumps(fields).encode()), 400)
    assert error["param"] == param
    assert param in error["message"]


def test_an_unknown_model_is_not_found(service: Service) -> None:
    error = refusal(send(service, CHAT, json.dumps({"model": "gpt-4", "messages": HELLO}).encode()), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert refusal(send(service, "/v1/models/gpt-4", method="GET"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/v1/embeddings", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405)],
)
def test_unknown_routes_and_methods_are_refused(service: Service, method: str, path: str, status: int) -> None:
    response = send(service, path, method=method)
    assert path in refusal(response, status)["message"]
    assert ("allow" in response.headers) is (status == 405)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_of_fifty_megabytes_is_too_large(service: Service, is_chunked: bool) -> None:
    part = b'{"prompt": "'.ljust(MEGABYTE, b"x")
    body: Any = (part for _ in range(50)) if is_chunked else part * 50
    error = refusal(send(service, COMPLETIONS, body), 413)
    assert error["code"] == "request_too_large"
    assert str(16 * MEGABYTE) in error["message"]


def test_a_request_id_of_another_form_is_refused(service: Service) -> None:
    response = send(service, COMPLETIONS, json.dumps(GOOD).encode(), headers={"X-Request-Id": "a b"})
    assert refusal(response, 400)["param"] == "X-Request-Id"
