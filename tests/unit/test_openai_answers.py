"""What the HTTP API answers: whole and as streams, from scripted routers with the real tokenizer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from http_client import Answer, ask, make_api
from log_records import fields_of, recorded
from scripted_routers import NUM_TOKENS, STOPPED, Attempt, ScriptedRouters, serve_two_then_die, serve_whole

from cluster.checkpoints.presets import create_checkpoint
from cluster.front.access_log import AccessLog
from cluster.front.errors import ServiceError, StatusCode
from cluster.front.open_requests import OpenRequests
from cluster.front.openai.token_texts import TokenTexts
from cluster.front.relay import CallEnd, QueueFullError
from cluster.front.tokenizer import Tokenizer
from router.messages import FinishReason, MissingExpertPolicy, TokenLogprobs

HELLO = [{"role": "user", "content": "Hello"}]
CHAT, COMPLETION = "createChatCompletion", "createCompletion"
EOT = 264
BOS = 256
TEXT = "Tränen!"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(create_checkpoint("tiny-maverick", tmp_path_factory.mktemp("m") / "m"))


def logprobs_of(token_ids: list[int]) -> list[TokenLogprobs]:
    """The most likely one is another each time: the letter x."""
    return [
        TokenLogprobs(token_id=token_id, logprob=-float(token_id), top=[(ord("x"), -0.5), (token_id, -float(token_id))])
        for token_id in token_ids
    ]


def speak(text: bytes, **end: Any) -> Any:
    """A router that answers with these bytes one by one and then the end of turn; choice i with i bytes less."""

    async def script(attempt: Attempt) -> CallEnd:
        request = attempt.request
        token_ids = [*text[: len(text) - request.params.choice_index], EOT]
        wants_prompt = request.params.num_prompt_logprobs is not None
        prompt = [None, *logprobs_of(request.prompt_ids[1:])] if wants_prompt else None
        for position in range(len(request.resume_ids), len(token_ids)):
            is_last = position == len(token_ids) - 1
            attempt.send(
                token_ids[position],
                finish_reason=FinishReason.STOP if is_last else None,
                logprobs=logprobs_of([token_ids[position]]) if request.params.num_logprobs is not None else None,
                prompt_logprobs=prompt,
                **end,
            )
            prompt = None
            await asyncio.sleep(0)
        return CallEnd(finish_reason=FinishReason.STOP)

    return script


def refuse(error: Exception) -> Any:
    async def script(attempt: Attempt) -> CallEnd:
        raise error

    return script


class Service:
    def __init__(self, tokenizer: Tokenizer, *scripts: Any) -> None:
        self.routers = ScriptedRouters(list(scripts) or [speak(TEXT.encode())])
        self.api = make_api(tokenizer, self.routers)

    def chat(self, **fields: Any) -> Answer:
        return ask(self.api, CHAT, {"messages": HELLO, **fields})

    def complete(self, **fields: Any) -> Answer:
        return ask(self.api, COMPLETION, {"prompt": "Hello", **fields})


@pytest.fixture
def service(tokenizer: Tokenizer) -> Service:
    return Service(tokenizer)


def texts(events: list[Any], index: int = 0) -> str:
    pieces = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(piece["text"] if "text" in piece else piece["delta"].get("content", "") for piece in pieces)


def test_a_chat_is_answered_with_a_message(service: Service) -> None:
    answer = ask(service.api, CHAT, {"messages": HELLO, "seed": 5}, headers={"x-request-id": "r1"})
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert "x-request-id" not in answer.headers
    body = answer.json()
    assert body.pop("created") > 1_700_000_000
    num_prompt_tokens = len(service.routers.requests[0].prompt_ids)
    assert body == {
        "id": "chatcmpl-r1",
        "object": "chat.completion",
        "model": "llama",
        "system_fingerprint": "fp_1.0",
        "seed": 5,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": 9,
            "total_tokens": num_prompt_tokens + 9,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_a_stream_of_a_chat_brings_the_same_and_never_half_a_character(service: Service) -> None:
    answer = service.chat(stream=True, n=2, seed=5)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.events()
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert [event["seed"] for event in events if "seed" in event] == [5]
    assert "seed" in events[0]
    assert all("usage" not in event for event in events)
    for index, text in ((0, TEXT), (1, TEXT[:-1])):
        pieces = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert pieces[0]["delta"]["role"] == "assistant"
        assert all("role" not in piece["delta"] for piece in pieces[1:])
        assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
        assert texts(events, index) == text
    assert "\ufffd" not in answer.body.decode()


@pytest.mark.parametrize("operation", [CHAT, COMPLETION])
def test_usage_comes_in_a_message_of_its_own_where_asked_for(service: Service, operation: str) -> None:
    asked = {"messages": HELLO} if operation == CHAT else {"prompt": "Hello"}
    whole = ask(service.api, operation, asked).json()["usage"]
    options = {"include_usage": True}
    *events, last = ask(service.api, operation, {**asked, "stream": True, "stream_options": options}).events()
    assert (last["choices"], last["usage"]) == ([], whole)
    assert all(event["usage"] is None for event in events)
    options["continuous_usage_stats"] = True
    *events, last = ask(service.api, operation, {**asked, "stream": True, "stream_options": options}).events()
    assert last["usage"] == whole
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == whole["completion_tokens"]
    assert {event["usage"]["prompt_tokens"] for event in events} == {whole["prompt_tokens"]}


def test_sampling_reaches_the_routers_under_their_names(service: Service) -> None:
    service.chat(
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        repetition_penalty=1.1,
        logit_bias={"5": 1.5},
        max_completion_tokens=7,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[9],
        logprobs=True,
        top_logprobs=3,
        seed=11,
        n=2,
        cache_salt="tenant",
        on_missing_expert="shared_only",
    )
    first, second = service.routers.requests
    params = first.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 0, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.2, 0.3, 1.1)
    assert (params.logit_bias, params.stop_token_ids) == ({5: 1.5}, (9,))
    assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (7, 2, True)
    assert (params.num_logprobs, params.seed) == (3, 11)
    assert (first.params.choice_index, second.params.choice_index) == (0, 1)
    assert (first.cache_salt, first.on_missing_expert) == ("tenant", MissingExpertPolicy.SHARED_ONLY)


def test_a_developer_speaks_as_the_system(service: Service, tokenizer: Tokenizer) -> None:
    for role in ("developer", "system"):
        ask(service.api, CHAT, {"messages": [{"role": role, "content": [{"type": "text", "text": "Be kind"}]}]})
    developer, system = (request.prompt_ids for request in service.routers.requests)
    assert developer == system
    assert "Be kind" in tokenizer.decode(system)


def test_a_completion_has_sixteen_tokens_by_default_and_a_chat_what_is_left(service: Service) -> None:
    service.complete()
    service.chat()
    completion, chat = service.routers.requests
    assert completion.params.max_tokens == 16
    assert chat.params.max_tokens == 256 - len(chat.prompt_ids)


def test_a_text_begins_with_the_begin_of_text_token_unless_told_otherwise(service: Service) -> None:
    service.complete()
    service.complete(add_special_tokens=False)
    assert [request.prompt_ids for request in service.routers.requests] == [[BOS, *b"Hello"], [*b"Hello"]]


def test_several_prompts_are_answered_in_their_order(service: Service) -> None:
    body = service.complete(prompt=["a", "b", "c"], n=2, seed=3).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert [choice["text"] for choice in body["choices"]] == [TEXT, TEXT[:-1]] * 3
    assert body["usage"]["prompt_tokens"] == 6
    assert body["usage"]["completion_tokens"] == 3 * (9 + 8)
    assert body["seed"] == 3
    prompts = {tuple(request.prompt_ids) for request in service.routers.requests}
    assert prompts == {(BOS, ord(letter)) for letter in "abc"}


def test_a_stream_of_several_prompts_brings_every_choice_to_its_end(service: Service) -> None:
    events = service.complete(prompt=[[5], [6]], n=2, stream=True).events()
    assert [texts(events, index) for index in range(4)] == [TEXT, TEXT[:-1]] * 2
    ends = [choice["index"] for event in events for choice in event["choices"] if choice["finish_reason"]]
    assert sorted(ends) == [0, 1, 2, 3]


def test_equal_prompts_without_a_seed_are_drawn_with_unequal_ones(service: Service) -> None:
    body = service.complete(prompt=["a", "a"]).json()
    seeds = {request.params.seed for request in service.routers.requests}
    assert len(seeds) == 2
    assert max(seeds) < 2**53
    assert "seed" not in body


def test_a_seed_that_was_drawn_is_told(service: Service) -> None:
    assert service.complete().json()["seed"] == service.routers.requests[0].params.seed


def test_more_choices_than_the_limit_are_refused(service: Service) -> None:
    answer = service.complete(prompt=["a", "b", "c"], n=3)
    assert (answer.status, answer.error["param"]) == (400, "prompt")
    assert "make 9 choices, the limit is 8" in answer.error["message"]
    assert service.complete(n=9).error["message"] == "n must be in [1, 8], not 9"
    assert service.routers.requests == []


async def serve_for_ever(attempt: Attempt) -> CallEnd:
    attempt.send(ord("a"))
    await asyncio.Event().wait()
    return STOPPED


def test_a_prompt_that_fails_ends_the_others(tokenizer: Tokenizer) -> None:
    service = Service(tokenizer, serve_for_ever, refuse(ServiceError(StatusCode.UNAVAILABLE, "no router is ready")))
    answer = service.complete(prompt=["a", "b"])
    assert (answer.status, answer.error["message"]) == (503, "no router is ready")
    assert service.routers.num_aborted == 1


def test_what_is_wrong_with_one_of_several_prompts_is_told_with_its_number(service: Service) -> None:
    error = service.complete(prompt=[[5], [5, 512]]).error
    assert error["param"] == "prompt"
    assert error["message"] == "prompt[1][1] must be a token id below 512, not 512"


def test_a_lost_router_does_not_show(tokenizer: Tokenizer) -> None:
    calm = Service(tokenizer, serve_whole).complete(return_token_ids=True, seed=1).json()["choices"]
    rough = (
        Service(tokenizer, serve_two_then_die, serve_whole).complete(return_token_ids=True, seed=1).json()["choices"]
    )
    assert calm == rough
    assert calm[0]["token_ids"] == list(range(NUM_TOKENS))


def test_tokens_of_a_chat_come_with_log_probabilities_and_bytes(service: Service) -> None:
    content = service.chat(logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content[:4]] == ["T", "r", "bytes:\\xc3", "bytes:\\xa4"]
    assert bytes(byte for entry in content[:-1] for byte in entry["bytes"]) == TEXT.encode()
    assert (content[-1]["token"], content[-1]["bytes"]) == ("<|eot|>", None)
    assert content[0]["logprob"] == -84.0
    assert content[0]["top_logprobs"] == [{"token": "x", "logprob": -0.5, "bytes": [120]}]
    own = service.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert {len(entry["top_logprobs"]) for entry in own} == {0}


def test_log_probabilities_of_a_stream_are_those_of_the_whole(service: Service) -> None:
    whole = service.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    events = service.chat(logprobs=True, top_logprobs=2, stream=True).events()
    assert [entry for event in events for entry in event["choices"][0]["logprobs"]["content"]] == whole
    columns = service.complete(logprobs=1, n=2).json()["choices"][1]["logprobs"]
    events = service.complete(logprobs=1, n=2, stream=True).events()
    parts = [choice["logprobs"] for event in events for choice in event["choices"] if choice["index"] == 1]
    assert {name: [entry for part in parts for entry in part[name]] for name in columns} == columns


def test_log_probabilities_of_a_completion_stand_in_columns(service: Service) -> None:
    columns = service.complete(logprobs=1).json()["choices"][0]["logprobs"]
    assert columns["tokens"][:5] == ["T", "r", "bytes:\\xc3", "bytes:\\xa4", "n"]
    assert columns["token_logprobs"][:2] == [-84.0, -114.0]
    assert columns["top_logprobs"][0] == {"x": -0.5, "T": -84.0}
    assert columns["text_offset"] == [0, 1, 2, 2, 3, 4, 5, 6, 7]
    columns = service.complete(logprobs=0).json()["choices"][0]["logprobs"]
    assert columns["top_logprobs"][0] == {"T": -84.0}


def test_tokens_can_be_named_by_their_ids(service: Service) -> None:
    columns = service.complete(logprobs=0, return_tokens_as_token_ids=True).json()["choices"][0]["logprobs"]
    assert columns["tokens"][0] == "token_id:84"


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_in_front_of_every_choice(service: Service, stream: bool, ids: bool) -> None:
    answer = service.complete(
        prompt=[[BOS, 195, 164], [BOS, 98]] if ids else ["ä", "b"], echo=True, n=2, logprobs=1, stream=stream
    )
    wanted = ["ä" + TEXT, "ä" + TEXT[:-1], "b" + TEXT, "b" + TEXT[:-1]]
    if stream:
        events = answer.events()
        assert [texts(events, index) for index in range(4)] == wanted
        first = [next(c for e in events for c in e["choices"] if c["index"] == index) for index in range(4)]
    else:
        first = answer.json()["choices"]
        assert [choice["text"] for choice in first] == wanted
    for choice in first[:2]:
        columns = choice["logprobs"]
        assert columns["tokens"][:4] == ["<|begin_of_text|>", "bytes:\\xc3", "bytes:\\xa4", "T"]
        assert columns["token_logprobs"][:4] == [None, -195.0, -164.0, -84.0]
        assert columns["top_logprobs"][:2] == [None, {"x": -0.5, "bytes:\\xc3": -195.0}]
        assert columns["text_offset"][:4] == [0, 0, 0, 1]
    assert first[2]["logprobs"]["token_logprobs"][:3] == [None, -98.0, -84.0]


@pytest.mark.parametrize("stream", [False, True])
def test_choices_that_echo_wait_for_the_log_probabilities_of_the_prompt(tokenizer: Tokenizer, stream: bool) -> None:
    others_have_spoken = asyncio.Event()

    async def speak_last(attempt: Attempt) -> CallEnd:
        """The first choice, which alone brings them."""
        await others_have_spoken.wait()
        return await speak(b"a")(attempt)  # type: ignore[no-any-return]

    async def speak_first(attempt: Attempt) -> CallEnd:
        end = await speak(b"bc")(attempt)
        asyncio.get_running_loop().call_later(0.05, others_have_spoken.set)
        return end  # type: ignore[no-any-return]

    service = Service(tokenizer, speak_last, speak_first)
    answer = service.complete(prompt="x", echo=True, logprobs=0, n=2, stream=stream)
    choices = [c for event in answer.events() for c in event["choices"]] if stream else answer.json()["choices"]
    columns = next(choice for choice in choices if choice["index"] == 1)["logprobs"]
    assert columns["tokens"][:3] == ["<|begin_of_text|>", "x", "b"]
    assert columns["token_logprobs"][:3] == [None, -120.0, -98.0]


def test_echo_of_no_tokens_gives_the_prompt_alone(service: Service) -> None:
    body = service.complete(prompt="ab", echo=True, logprobs=0, max_tokens=0).json()
    [choice] = body["choices"]
    assert choice["text"] == "ab"
    assert choice["logprobs"]["token_logprobs"] == [None, -97.0, -98.0]
    assert body["usage"]["completion_tokens"] == 0
    assert body["usage"]["total_tokens"] == 3
    assert service.routers.requests[0].params.max_tokens == 1
    events = service.complete(prompt="ab", echo=True, max_tokens=0, stream=True).events()
    assert texts(events) == "ab"


def test_echo_of_one_token_needs_no_log_probabilities_of_it(service: Service) -> None:
    columns = service.complete(prompt=[97], echo=True, logprobs=0).json()["choices"][0]["logprobs"]
    assert columns["token_logprobs"][:2] == [None, -84.0]


def test_prompt_logprobs_are_by_token_id_with_ranks(service: Service) -> None:
    [choice] = service.complete(prompt=[97, 98], prompt_logprobs=2).json()["choices"]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "98": {"logprob": -98.0, "rank": 2, "decoded_token": "b"},
            "120": {"logprob": -0.5, "rank": 1, "decoded_token": "x"},
        },
    ]
    body = service.chat(prompt_logprobs=1).json()
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]


def test_token_ids_come_where_asked_for(service: Service) -> None:
    body = service.chat(return_token_ids=True).json()
    assert body["prompt_token_ids"] == service.routers.requests[0].prompt_ids
    assert body["choices"][0]["token_ids"] == [*TEXT.encode(), EOT]
    events = service.complete(prompt=["a", "b"], return_token_ids=True, stream=True).events()
    for index in range(2):
        pieces = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert [piece["prompt_token_ids"] for piece in pieces if "prompt_token_ids" in piece] == [[BOS, 97 + index]]
        assert [token_id for piece in pieces for token_id in piece["token_ids"]] == [*TEXT.encode(), EOT]


def test_a_stream_goes_on_from_what_the_client_has(service: Service) -> None:
    asked = {"messages": HELLO, "stream": True, "return_token_ids": True, "n": 2}
    whole = ask(service.api, CHAT, asked, headers={"x-request-id": "r"}).events()
    got = next(choice["token_ids"] for event in whole for choice in event["choices"] if choice["index"] == 1)
    resumed = [{"index": 0, "token_ids": [5], "finished": True}, {"index": 1, "token_ids": got}]
    again = {**asked, "seed": whole[0]["seed"], "resume_token_ids": resumed}
    events = ask(service.api, CHAT, again, headers={"x-request-id": "r"}).events()
    assert {choice["index"] for event in events for choice in event["choices"]} == {1}
    assert texts(whole, 1).endswith(texts(events, 1))
    assert events[0]["id"] == whole[0]["id"]
    rest = [token_id for event in events for choice in event["choices"] for token_id in choice["token_ids"]]
    assert got + rest == [*TEXT.encode()[:-1], EOT]


@pytest.mark.parametrize("operation", [CHAT, COMPLETION])
def test_a_degraded_choice_says_so(tokenizer: Tokenizer, operation: str) -> None:
    asked: dict[str, Any] = {"messages": HELLO} if operation == CHAT else {"prompt": "x"}
    for degraded in (False, True):
        api = Service(tokenizer, speak(b"hi", degraded=degraded)).api
        [choice] = ask(api, operation, asked).json()["choices"]
        events = ask(api, operation, {**asked, "stream": True}).events()
        assert choice.get("degraded", False) is degraded
        assert any(piece.get("degraded", False) for event in events for piece in event["choices"]) is degraded


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "retry"),
    [
        (QueueFullError("full"), 429, "rate_limit_error", "queue_full", "1"),
        (ServiceError(StatusCode.UNAVAILABLE, "no router"), 503, "server_error", "unavailable", "1"),
        (ServiceError(StatusCode.INTERNAL, "internal error"), 500, "server_error", "internal_error", None),
        (KeyError("secret of the inside"), 500, "server_error", "internal_error", None),
    ],
)
def test_a_failure_before_the_first_token_has_its_status(
    tokenizer: Tokenizer, stream: bool, error: Exception, status: int, kind: str, code: str, retry: str | None
) -> None:
    answer = Service(tokenizer, refuse(error)).chat(stream=stream)
    assert answer.status == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers.get("retry-after") == retry
    assert (answer.error["type"], answer.error["code"], answer.error["param"]) == (kind, code, None)
    assert "inside" not in answer.body.decode()


def test_a_failure_in_the_middle_of_a_stream_is_its_last_event(tokenizer: Tokenizer) -> None:
    async def fail_late(attempt: Attempt) -> CallEnd:
        attempt.send(ord("a"))
        await asyncio.sleep(0.01)
        raise ServiceError(StatusCode.UNAVAILABLE, "an expert is missing")

    answer = Service(tokenizer, fail_late).chat(stream=True)
    assert answer.status == 200
    assert b"[DONE]" not in answer.body
    last = answer.body.decode().split("\n\n")[-2]
    assert '"message":"an expert is missing"' in last
    assert last.startswith('data: {"error":')


def test_core_errors_are_told_under_the_names_of_the_request(service: Service) -> None:
    error = service.chat(logprobs=True, top_logprobs=6).error
    assert error["param"] == "top_logprobs"
    assert error["message"].startswith("top_logprobs must be in [0, 5]")
    error = service.chat(messages=[{"role": "user", "content": "x" * 300}]).error
    assert error["param"] == "messages"
    assert "fewer tokens" in error["message"]
    assert service.complete(prompt="x" * 300).error["param"] == "prompt"
    assert service.complete(min_tokens=17).error["param"] == "min_tokens"


def test_an_unknown_model_is_not_found(service: Service) -> None:
    for answer in (
        service.chat(model="gpt-4"),
        ask(service.api, "tokenize", {"model": "gpt-4", "prompt": "x"}),
        ask(service.api, "retrieveModel", path_params={"model": "gpt-4"}),
    ):
        assert (answer.status, answer.error["param"], answer.error["code"]) == (404, "model", "model_not_found")
    assert service.chat(model="llama").status == 200


def test_models_lists_the_one_there_is(service: Service) -> None:
    card = {"id": "llama", "object": "model", "created": 7, "owned_by": "arriero", "max_model_len": 256}
    assert ask(service.api, "listModels").json() == {"object": "list", "data": [card]}
    assert ask(service.api, "retrieveModel", path_params={"model": "llama"}).json() == card


def test_a_request_id_of_another_form_is_refused(service: Service) -> None:
    answer = ask(service.api, CHAT, {"messages": HELLO}, headers={"x-request-id": "a b"})
    assert (answer.status, answer.error["param"]) == (400, "X-Request-Id")


def test_tokenize_and_detokenize_go_there_and_back(service: Service) -> None:
    body = ask(service.api, "tokenize", {"prompt": "hä", "return_token_strs": True}).json()
    assert body == {
        "count": 4,
        "max_model_len": 256,
        "tokens": [BOS, 104, 195, 164],
        "token_strs": ["<|begin_of_text|>", "h", "bytes:\\xc3", "bytes:\\xa4"],
    }
    assert ask(service.api, "detokenize", {"tokens": body["tokens"]}).json() == {"prompt": "hä"}
    spelled = ask(service.api, "detokenize", {"tokens": body["tokens"], "skip_special_tokens": False}).json()
    assert spelled == {"prompt": "<|begin_of_text|>hä"}
    assert ask(service.api, "tokenize", {"prompt": "h", "add_special_tokens": False}).json()["tokens"] == [104]
    chat = ask(service.api, "tokenize", {"messages": HELLO}).json()
    service.chat()
    assert chat["tokens"] == service.routers.requests[0].prompt_ids
    assert ask(service.api, "detokenize", {"tokens": [512]}).error["param"] == "tokens"
    assert ask(service.api, "tokenize", {"prompt": ""}).error["param"] == "prompt"


def test_tokens_have_texts_without_a_tokenizer_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    bare = TokenTexts(Tokenizer(tmp_path))
    assert bare.text_and_bytes(5) == ("token_id:5", None)
    assert TokenTexts(tokenizer).text_and_bytes(600) == ("token_id:600", None)


@pytest.mark.parametrize(
    ("operation", "body", "headers", "expected"),
    [
        (CHAT, {"messages": HELLO}, {"x-request-id": "mine"}, ("/v1/chat/completions", "mine", "OK")),
        (COMPLETION, {"prompt": "a"}, {"x-request-id": "mine"}, ("/v1/completions", "mine", "OK")),
        (COMPLETION, {"prompt": "a" * 300}, {"x-request-id": "m"}, ("/v1/completions", "m", "INVALID_ARGUMENT")),
        (CHAT, {"messages": []}, {}, ("/v1/chat/completions", None, "INVALID_ARGUMENT")),
        (CHAT, b"{", {}, ("/v1/chat/completions", None, "INVALID_ARGUMENT")),
        (COMPLETION, {"prompt": "a", "model": "other"}, {}, ("/v1/completions", None, "NOT_FOUND")),
    ],
)
def test_every_request_has_its_line_and_is_counted_once(
    tokenizer: Tokenizer,
    operation: str,
    body: Any,
    headers: dict[str, str],
    expected: tuple[str, str | None, str],
) -> None:
    requests = OpenRequests(access_log=AccessLog("on"))
    api = make_api(tokenizer, ScriptedRouters([speak(TEXT.encode())]), requests)
    with recorded("arriero.access") as lines:
        ask(api, operation, body, headers=headers)
    [line] = [fields_of(line) for line in lines]
    assert (line["method"], line.get("request_id"), line["status"]) == expected
    assert line["protocol"] == "http"
    numbers = requests.report().metrics.numbers
    num_errors = sum(numbers["arriero:request_errors"].values())
    assert (num_errors, sum(numbers["vllm:request_success"].values())) == ((0, 1) if expected[2] == "OK" else (1, 0))


def test_each_prompt_of_a_batch_has_a_line_under_the_requests_id(tokenizer: Tokenizer) -> None:
    api = make_api(tokenizer, ScriptedRouters([speak(TEXT.encode())]), OpenRequests(access_log=AccessLog("on")))
    with recorded("arriero.access") as lines:
        ask(api, COMPLETION, {"prompt": ["a", "b"]}, headers={"x-request-id": "mine"})
    assert sorted(fields_of(line)["request_id"] for line in lines) == ["mine-0", "mine-1"]
