"""The `openai` client, as it is, sync and async, against the service: everything a user of OpenAI's API touches."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from conftest import Service
from http_calls import MODEL, async_openai_client, openai_client
from openai import OpenAI
from tiny_models import prompt

from cluster.client_types import Sampling
from cluster.front.chat import ChatMessage

CONTENT = "Where do llamas live?"
MESSAGES: Any = [{"role": "user", "content": CONTENT}]
CHAT: Any = {"model": MODEL, "messages": MESSAGES, "seed": 5, "max_completion_tokens": 24}
COMPLETION: Any = {"model": MODEL, "prompt": CONTENT, "seed": 5, "max_tokens": 24}
ON: Any = {"ignore_eos": True, "return_token_ids": True}
NUM_STREAMS = 64


@pytest.fixture(scope="module")
def client(service: Service) -> OpenAI:
    return openai_client(service)


def test_a_chat_is_what_grpc_answers_to_the_same_request(service: Service, client: OpenAI) -> None:
    sampling = Sampling(max_tokens=24, ignore_eos=True)
    with service.client() as grpc:
        pieces = list(grpc.generate([ChatMessage.of_text("user", CONTENT)], sampling=sampling, seed=5))
    answer = client.chat.completions.create(**CHAT, extra_body=ON)
    [choice] = answer.choices
    assert choice.message.content == "".join(piece.text for piece in pieces)
    assert choice.token_ids == [token_id for piece in pieces for token_id in piece.token_ids]
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (24, len(answer.prompt_token_ids))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    assert answer.id == f"chatcmpl-{answer._request_id}"
    assert answer.system_fingerprint.startswith("fp_")


def test_a_chat_streams_what_it_would_answer_whole(client: OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT, n=2, logprobs=True, top_logprobs=3, extra_body=ON)
    options: Any = {"include_usage": True}
    stream = client.chat.completions.create(
        **CHAT, n=2, logprobs=True, top_logprobs=3, stream=True, stream_options=options, extra_body=ON
    )
    chunks = list(stream)
    assert chunks[0].seed == 5
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 48
    for index in range(2):
        pieces = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(piece.delta.content or "" for piece in pieces) == whole.choices[index].message.content
        assert [token for piece in pieces for token in piece.token_ids] == whole.choices[index].token_ids
        entries = [entry for piece in pieces for entry in piece.logprobs.content]
        assert entries == whole.choices[index].logprobs.content
        assert {len(entry.top_logprobs) for entry in entries} == {3}
        assert pieces[-1].finish_reason == "length"
    assert whole.choices[0].token_ids != whole.choices[1].token_ids


def test_completions_take_texts_and_ids_one_or_many(client: OpenAI) -> None:
    texts = ["Where do", "llamas live?"]
    ids = [client.post("../tokenize", body={"prompt": text}, cast_to=object)["tokens"] for text in texts]
    by_text = client.completions.create(**{**COMPLETION, "prompt": texts}, n=2)
    by_ids = client.completions.create(**{**COMPLETION, "prompt": ids}, n=2)
    assert [choice.text for choice in by_text.choices] == [choice.text for choice in by_ids.choices]
    assert [choice.index for choice in by_text.choices] == [0, 1, 2, 3]
    for index, one in enumerate((texts[0], ids[1])):
        alone = client.completions.create(**{**COMPLETION, "prompt": one}, n=2)
        assert [choice.text for choice in alone.choices] == [
            choice.text for choice in by_text.choices[2 * index : 2 * index + 2]
        ]
    assert by_text.usage.prompt_tokens == sum(map(len, ids))


def test_echo_scores_the_prompt_as_the_answer_was_scored(client: OpenAI) -> None:
    first = client.completions.create(**COMPLETION, logprobs=2, extra_body=ON).choices[0]
    ids = [*client.post("../tokenize", body={"prompt": CONTENT}, cast_to=object)["tokens"], *first.token_ids]
    scored = client.completions.create(model=MODEL, prompt=ids, echo=True, logprobs=2, max_tokens=0).choices[0]
    assert len(scored.logprobs.tokens) == len(ids)
    assert scored.logprobs.token_logprobs[0] is None
    # Float32 is exact: whether a token was drawn or given, its log probability is the same.
    assert scored.logprobs.token_logprobs[-24:] == first.logprobs.token_logprobs
    assert scored.logprobs.tokens[-24:] == first.logprobs.tokens
    assert scored.text.startswith(CONTENT)
    [prompt_rows] = [
        client.completions.create(model=MODEL, prompt=ids, max_tokens=1, extra_body={"prompt_logprobs": 1})
        .choices[0]
        .prompt_logprobs
    ]
    own = [row[str(token_id)]["logprob"] for row, token_id in zip(prompt_rows[1:], ids[1:], strict=True)]
    assert own == scored.logprobs.token_logprobs[1:]


def test_stop_strings_end_the_text_before_them(client: OpenAI) -> None:
    asked: Any = {**COMPLETION, "logit_bias": {"97": 100, "98": 100, "99": 100}}
    whole = client.completions.create(**asked).choices[0].text
    assert set(whole) == set("abc")
    stop = whole[9:12]
    for stream in (False, True):
        answer = client.completions.create(**asked, stop=[stop, "never"], stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_biases_and_seeds_decide_what_is_drawn(client: OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, logit_bias={"97": 100}, temperature=0)
    assert answer.choices[0].message.content == "a" * 24
    asked = {**COMPLETION, "seed": None}
    drawn = client.completions.create(**asked)
    again = client.completions.create(**{**asked, "seed": drawn.seed})
    assert again.choices[0].text == drawn.choices[0].text
    assert client.completions.create(**asked).seed != drawn.seed


def test_models_are_listed_and_found(client: OpenAI) -> None:
    [model] = client.models.list()
    assert (model.id, model.owned_by, model.max_model_len) == (MODEL, "arriero", 4096)
    assert client.models.retrieve(MODEL) == model


def test_a_request_id_goes_there_and_back(client: OpenAI) -> None:
    answer = client.completions.with_raw_response.create(**COMPLETION, extra_headers={"X-Request-Id": "mine.1"})
    assert answer.headers.get_list("x-request-id") == ["mine.1"]
    assert answer.parse().id == "cmpl-mine.1"


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"n": 10**6}, openai.BadRequestError, "n"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format"),
        ({"extra_body": {"color": 1}}, openai.BadRequestError, "color"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_own(
    client: OpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], param: str, stream: bool
) -> None:
    with pytest.raises(error) as failure:
        client.chat.completions.create(**{**CHAT, **fields}, stream=stream)
    assert failure.value.param == param
    assert failure.value.type == "invalid_request_error"
    assert param in failure.value.message


def test_the_async_client_does_the_same(service: Service, client: OpenAI) -> None:
    async def ask() -> tuple[Any, ...]:
        async with async_openai_client(service) as asynchronous:
            chat, completion, chats, completions = await asyncio.gather(
                asynchronous.chat.completions.create(**CHAT),
                asynchronous.completions.create(**COMPLETION),
                asynchronous.chat.completions.create(**CHAT, stream=True),
                asynchronous.completions.create(**COMPLETION, stream=True),
            )
            streamed = [chunk.choices[0].delta.content or "" async for chunk in chats]
            texts = [chunk.choices[0].text async for chunk in completions]
            with pytest.raises(openai.NotFoundError):
                await asynchronous.models.retrieve("gpt-4")
            return chat.choices[0].message.content, completion.choices[0].text, "".join(streamed), "".join(texts)

    chat = client.chat.completions.create(**CHAT).choices[0].message.content
    completion = client.completions.create(**COMPLETION).choices[0].text
    assert asyncio.run(ask()) == (chat, completion, chat, completion)


def test_sixty_four_streams_at_once_are_each_what_they_are_alone(service: Service, client: OpenAI) -> None:
    requests: list[Any] = [
        {"model": MODEL, "prompt": prompt(3 + index, seed=index), "seed": index, "max_tokens": 12, "extra_body": ON}
        for index in range(NUM_STREAMS)
    ]

    async def stream(asynchronous: openai.AsyncOpenAI, request: Any) -> tuple[str, list[int], str | None]:
        pieces = [chunk.choices[0] async for chunk in await asynchronous.completions.create(**request, stream=True)]
        ids = [token_id for piece in pieces for token_id in piece.token_ids]
        return "".join(piece.text for piece in pieces), ids, pieces[-1].finish_reason

    async def stream_all() -> list[tuple[str, list[int], str | None]]:
        async with async_openai_client(service) as asynchronous:
            return list(await asyncio.gather(*(stream(asynchronous, request) for request in requests)))

    crowd = asyncio.run(stream_all())
    for request, streamed in zip(requests, crowd, strict=True):
        alone = client.completions.create(**request).choices[0]
        assert streamed == (alone.text, alone.token_ids, "length")


def test_a_stream_that_broke_goes_on_where_it_was(client: OpenAI) -> None:
    whole = client.completions.create(**COMPLETION, extra_body=ON).choices[0]
    resumed = [{"index": 0, "token_ids": whole.token_ids[:10]}]
    stream = client.completions.create(**COMPLETION, stream=True, extra_body={**ON, "resume_token_ids": resumed})
    pieces = [chunk.choices[0] for chunk in stream]
    assert [token_id for piece in pieces for token_id in piece.token_ids] == whole.token_ids[10:]
    assert whole.text.endswith("".join(piece.text for piece in pieces))
