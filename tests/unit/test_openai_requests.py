"""What the HTTP API takes and what it refuses, by the field that is to blame."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.front.openai.api_error import ApiError
from cluster.front.openai.chat_request import ChatRequest
from cluster.front.openai.completion_request import CompletionRequest
from cluster.front.openai.request_fields import RequestModel
from cluster.front.openai.request_parsing import parse
from cluster.front.openai.tokenize_request import DetokenizeRequest, TokenizeRequest

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps({"messages": HELLO, **fields}).encode())


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"prompt": "Hello", **fields}).encode())


def refusal(model: type[RequestModel], body: Any) -> ApiError:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as failure:
        parse(model, data)
    assert failure.value.status == 400
    assert len(failure.value.message) < 400
    return failure.value


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "EOF"),
        (b"{", "EOF"),
        (b'{"messages": [}', "expected value"),
        (b'{"messages": []} x', "trailing"),
        (b'{"user": "\xff\xfe"}', "invalid unicode"),
        (b'{"user": "\\ud800"}', "escape"),
        (b'{"user": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "recursion limit"),
        (b'{"n": ' + b"9" * 100_000 + b"}", "out of range"),
        (b"\xef\xbb\xbf{}", "expected value"),
    ],
)
def test_what_is_not_json_is_refused_as_such(body: bytes, words: str) -> None:
    error = refusal(ChatRequest, body)
    assert (error.param, error.code) == (None, "invalid_json")
    assert "not JSON" in error.message
    assert words in error.message


@pytest.mark.parametrize("body", [[], None, 5, "text", True])
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    assert "must be a JSON object" in refusal(ChatRequest, body).message


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": "5"}, "temperature", "'5'"),
        ({"temperature": True}, "temperature", "true"),
        ({"temperature": 2.1}, "temperature", "2.1"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"temperature": float("inf")}, "temperature", "finite"),
        ({"top_p": 0}, "top_p", "0"),
        ({"n": 0}, "n", "0"),
        ({"n": 1.0}, "n", "1.0"),
        ({"n": "2"}, "n", "'2'"),
        ({"n": 10**30}, "n", "must be"),
        ({"seed": -1}, "seed", "-1"),
        ({"seed": 2**63}, "seed", str(2**63)),
        ({"stream": "yes"}, "stream", "'yes'"),
        ({"stream": 1}, "stream", "1"),
        ({"stop": 5}, "stop", "a text or a list of texts"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"stop": ["a", 5]}, "stop[1]", "5"),
        ({"stop": ["x"] * 17}, "stop", "16"),
        ({"stop": "x" * 257}, "stop", "256"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a", "'a'"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "101"),
        ({"logit_bias": {str(index): "x" for index in range(2000)}}, "logit_bias", "not 2000"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "-1"),
        ({"stop_token_ids": [5] * 1025}, "stop_token_ids", "1024"),
        ({"repetition_penalty": 0}, "repetition_penalty", "0"),
        ({"min_p": 1.5}, "min_p", "1.5"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only for stream"),
        ({"stream": True, "stream_options": {"what": 1}}, "stream_options.what", "not a field"),
        ({"stream": True, "stream_options": []}, "stream_options", "an array"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "not possible with stream"),
        ({"on_missing_expert": "later"}, "on_missing_expert", "'later'"),
        ({"cache_salt": "x" * 257}, "cache_salt", "256"),
        ({"resume_token_ids": [{"index": 0, "token_ids": [5]}]}, "resume_token_ids", "only for stream"),
        ({"stream": True, "resume_token_ids": [{"index": 0, "token_ids": [5]}]}, "resume_token_ids", "seed"),
        ({"what": 1}, "what", "not a field"),
        ({"x" * 1000: 1}, "x" * 80 + "...", "not a field"),
    ],
)
@pytest.mark.parametrize("ask", [chat, completion])
def test_a_wrong_value_is_refused_by_field_and_value(ask: Any, fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as failure:
        ask(**fields)
    error = failure.value
    assert (error.status, error.param) == (400, param)
    assert error.message.startswith(f"{param} ")
    assert words in error.message


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        (None, "messages", "must be a valid array, not null"),
        ([], "messages", "at least 1 item"),
        ("Hello", "messages", "'Hello'"),
        ([{"role": "root", "content": "x"}], "messages[0].role", "'root'"),
        ([*HELLO, {"role": "user"}], "messages[1].content", "is required"),
        ([{"role": "user", "content": None}], "messages[0].content", "null"),
        ([{"role": "user", "content": []}], "messages[0].content", "at least 1"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "is required"),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type", "is required"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}],
            "messages[0].content[1]",
            "is of type 'image_url': images are not supported yet",
        ),
        ([{"role": "user", "content": [{"type": "what"}]}], "messages[0].content[0]", "'what'"),
        ([{"role": "user", "content": "x", "color": 1}], "messages[0].color", "not a field"),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
            "messages[0].tool_calls",
            "is not supported yet",
        ),
        ([{}] * 100_000, "messages[0].role", "is required"),
    ],
)
def test_a_wrong_message_is_refused_by_its_place(messages: Any, param: str, words: str) -> None:
    error = refusal(ChatRequest, {"messages": messages})
    assert error.param == param
    assert words in error.message


def test_required_fields_are_missed_by_name() -> None:
    for model, field in ((ChatRequest, "messages"), (CompletionRequest, "prompt"), (DetokenizeRequest, "tokens")):
        error = refusal(model, {})
        assert (error.param, error.code) == (field, "missing_required_parameter")


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("", "prompt"),
        ([], "prompt"),
        (5, "prompt"),
        ({}, "prompt"),
        ([None], "prompt"),
        (["a", ""], "prompt[1]"),
        (["a", 5], "prompt[1]"),
        ([5, "a"], "prompt[1]"),
        ([5, -1], "prompt[1]"),
        ([5, True], "prompt[1]"),
        ([5, 2**32], "prompt[1]"),
        ([[5], []], "prompt[1]"),
        ([[5], [6, "a"]], "prompt[1][1]"),
        ([5.0, 6], "prompt"),
    ],
)
def test_a_wrong_prompt_is_refused_by_its_place(prompt: Any, param: str) -> None:
    assert refusal(CompletionRequest, {"prompt": prompt}).param == param


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_a_prompt_comes_in_four_forms(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompts == prompts


UNSUPPORTED: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "x", "format": "mp3"},
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "low",
    "verbosity": "low",
    "web_search_options": {},
    "skip_special_tokens": False,
}
NEUTRAL: dict[str, Any] = {
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "skip_special_tokens": True,
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_is_not_served_is_refused_and_never_ignored(field: str) -> None:
    error = refusal(ChatRequest, {"messages": HELLO, field: UNSUPPORTED[field]})
    assert (error.param, error.code) == (field, "unsupported_parameter")
    assert error.message == f"{field} is not supported yet"


@pytest.mark.parametrize("fields", [NEUTRAL, dict.fromkeys(UNSUPPORTED)])
def test_what_is_not_served_may_be_named_where_it_asks_for_nothing(fields: dict[str, Any]) -> None:
    chat(**fields)


def test_best_of_and_suffix_are_refused() -> None:
    assert refusal(CompletionRequest, {"prompt": "x", "best_of": 2}).param == "best_of"
    assert refusal(CompletionRequest, {"prompt": "x", "suffix": "y"}).param == "suffix"
    completion(best_of=1, suffix=None)


def test_one_of_another_type_is_not_neutral() -> None:
    assert refusal(CompletionRequest, {"prompt": "x", "best_of": True}).param == "best_of"


def test_ignored_fields_are_known_by_name() -> None:
    request = chat(user="me", metadata={"a": "b"}, store=False, service_tier=None, temperature=1)
    assert sorted(request.ignored_fields) == ["metadata", "store", "user"]


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answer = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None, "annotations": []}
    assert chat(messages=[*HELLO, answer]).messages[1].texts == ["Hi"]


def test_every_optional_field_may_be_null() -> None:
    for model, required in ((ChatRequest, {"messages": HELLO}), (CompletionRequest, {"prompt": "x"})):
        nulls = {name: None for name in model.model_fields if name not in required}
        parse(model, json.dumps({**nulls, **required}).encode())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"logprobs": 5}, "logprobs"),
    ],
)
def test_fields_of_chat_that_do_not_go_together(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as failure:
        chat(**fields)
    assert failure.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "logprobs": 1, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True, "stream": True, "seed": 1, "resume_token_ids": []}, "resume_token_ids"),
        ({"prompt": ["a", "b"], "stream": True, "seed": 1, "resume_token_ids": []}, "resume_token_ids"),
    ],
)
def test_fields_of_completions_that_do_not_go_together(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as failure:
        completion(**fields)
    assert failure.value.param == param


@pytest.mark.parametrize("body", [{}, {"prompt": "x", "messages": HELLO}])
def test_tokenize_takes_a_text_or_a_chat(body: Any) -> None:
    assert refusal(TokenizeRequest, body).param == "prompt"
