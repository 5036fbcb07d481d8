"""How an HTTP request is read, attended and left: bodies, clients that go, errors."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from http_client import LIMITS, Connection, ask, connection, make_api
from scripted_routers import STOPPED, Attempt, ScriptedRouters, serve_whole

from cluster.checkpoints.byte_tokenizer import write_tokenizer
from cluster.front.openai import attendance
from cluster.front.openai.api import OpenAiApi
from cluster.front.relay import CallEnd
from cluster.front.tokenizer import Tokenizer

COMPLETION = "createCompletion"
BODY = {"prompt": [5], "n": 2}


async def serve_for_ever(attempt: Attempt) -> CallEnd:
    attempt.send(ord("a"))
    await asyncio.Event().wait()
    return STOPPED


async def serve_nothing(attempt: Attempt) -> CallEnd:
    await asyncio.Event().wait()
    return STOPPED


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("m")
    write_tokenizer(folder)
    return Tokenizer(folder)


def run(act: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(20):
            return await act

    return asyncio.run(bounded())


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [serve_nothing, serve_for_ever])
def test_a_client_that_goes_ends_its_request(tokenizer: Tokenizer, script: Any, stream: bool) -> None:
    async def check() -> None:
        routers = ScriptedRouters([script])
        asked = connection({**BODY, "stream": stream})
        serving = asyncio.create_task(asked.serve(make_api(tokenizer, routers), COMPLETION))
        await until(lambda: len(routers.requests) == 2)
        if stream and script is serve_for_ever:
            await asked.begun.wait()
        asked.gone.set()
        await serving
        assert routers.num_aborted == 2
        assert routers.streams == {}
        # Serve's proxy wants to see some response, whoever is there to read it.
        assert asked.sent[0]["type"] == "http.response.start"

    run(check())


def test_a_cancelled_call_ends_its_request(tokenizer: Tokenizer) -> None:
    async def check() -> None:
        routers = ScriptedRouters([serve_for_ever])
        serving = asyncio.create_task(connection(BODY).serve(make_api(tokenizer, routers), COMPLETION))
        await until(lambda: len(routers.requests) == 2)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert routers.num_aborted == 2

    run(check())


@pytest.mark.parametrize("parts", [[], [b'{"prompt": ']])
def test_a_client_that_goes_while_it_sends_is_not_worked_for(tokenizer: Tokenizer, parts: list[bytes]) -> None:
    async def check() -> None:
        routers = ScriptedRouters([serve_whole])
        asked = connection(parts=parts, is_whole=False)
        asked.gone.set()
        await asked.serve(make_api(tokenizer, routers), COMPLETION)
        assert routers.requests == []
        assert asked.answer().status == 499

    run(check())


def test_a_client_that_goes_after_its_answer_has_had_it(tokenizer: Tokenizer) -> None:
    async def check() -> None:
        asked = connection(BODY)
        original = asked.send

        async def send_and_go(message: Any) -> None:
            await original(message)
            asked.gone.set()

        asked.send = send_and_go  # type: ignore[method-assign]
        await asked.serve(make_api(tokenizer, ScriptedRouters([serve_whole])), COMPLETION)
        assert asked.answer().status == 200

    run(check())


@pytest.fixture
def api(tokenizer: Tokenizer) -> OpenAiApi:
    return make_api(tokenizer, ScriptedRouters([serve_whole]))


def test_a_body_may_come_in_parts(api: OpenAiApi) -> None:
    assert ask(api, COMPLETION, parts=[b'{"pro', b"", b'mpt": ', b"[5]}"]).status == 200


def test_a_body_that_says_it_is_too_large_is_not_read(api: OpenAiApi) -> None:
    async def check() -> Connection:
        asked = connection(b"{}", headers={"content-length": str(LIMITS.max_request_bytes + 1)})
        await asked.serve(api, COMPLETION)
        return asked

    asked = run(check())
    assert asked.num_read == 0
    assert (asked.answer().status, asked.answer().error["code"]) == (413, "request_too_large")
    assert "100001" in asked.answer().error["message"]


def test_a_body_that_becomes_too_large_is_read_no_further(api: OpenAiApi) -> None:
    async def check() -> Connection:
        asked = connection(parts=[b" " * 40_000] * 10)
        await asked.serve(api, COMPLETION)
        return asked

    asked = run(check())
    assert asked.num_read == 3
    assert asked.answer().status == 413


def test_a_body_of_the_largest_size_is_taken(api: OpenAiApi) -> None:
    body = b'{"prompt": [5]}'.ljust(LIMITS.max_request_bytes)
    assert ask(api, COMPLETION, body, headers={"content-length": str(len(body))}).status == 200


def test_a_body_that_does_not_come_is_not_waited_for(api: OpenAiApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "BODY_TIMEOUT_S", 0.01)
    answer = ask(api, COMPLETION, parts=[b"{"], is_whole=False)
    assert answer.status == 408
    assert "0.01 s" in answer.error["message"]


def test_what_nobody_expected_is_told_as_internal_and_logged(
    api: OpenAiApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("of the inside")

    monkeypatch.setattr(api._model.__class__, "card", fail)
    answer = ask(api, "listModels")
    assert (answer.status, answer.error["message"]) == (500, "internal error")
    assert "of the inside" in caplog.text


def test_ignored_fields_are_warned_of_once(api: OpenAiApi, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        assert ask(api, COMPLETION, {**BODY, "user": "me", "store": True, "metadata": None}).status == 200
    assert [record.getMessage() for record in caplog.records if "ignores" in record.getMessage()] == [
        "requests set user, which this service ignores",
        "requests set store, which this service ignores",
    ]
