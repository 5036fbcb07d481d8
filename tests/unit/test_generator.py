"""From a client's call to chunks, against scripted routers and the real tokenizer."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from log_records import fields_of, recorded
from scripted_routers import NUM_TOKENS, Attempt, ScriptedRouters, serve_two_then_die, serve_whole

from cluster.checkpoints.byte_tokenizer import SPECIAL_TOKENS, build_tokenizer
from cluster.checkpoints.presets import create_checkpoint
from cluster.front.admission import ServiceLimits
from cluster.front.chat import ChatMessage
from cluster.front.chat_encoder import chat_encoder
from cluster.front.errors import ServiceError, StatusCode
from cluster.front.generate_call import ChatPrompt, Chunk, GenerateCall, ResumedChoice, TextPrompt, TokenPrompt
from cluster.front.generator import Generator, SeedSource
from cluster.front.open_requests import OpenRequests
from cluster.front.relay import CallEnd, RelayLimits, RouterLostError
from cluster.front.served_weights import ServedWeights
from cluster.front.tokenizer import Tokenizer
from router.messages import FinishReason, TokenLogprobs

LIMITS = ServiceLimits(max_model_len=256, vocab_size=512, max_logprobs=5, max_choices=4, max_request_bytes=1_000_000)
TEXT = "tränen"
EOM, EOT = SPECIAL_TOKENS["<|eom|>"], SPECIAL_TOKENS["<|eot|>"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(create_checkpoint("tiny-maverick", tmp_path_factory.mktemp("m") / "m"))


def generator(tokenizer: Tokenizer, routers: ScriptedRouters, *, seed: int | None = None, **parts: Any) -> Generator:
    return Generator(
        tokenizer=tokenizer,
        limits=LIMITS,
        routers=routers,
        tokens=routers,
        relay_limits=RelayLimits(stream_interval_s=0.0, resubmit_timeout_s=5.0),
        seeds=SeedSource(seed, gateway_index=0),
        **parts,
    )


def run(act: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(20):
            return await act

    return asyncio.run(bounded())


def chunks_of(made: Generator, **call: Any) -> list[Chunk]:
    async def collect() -> list[Chunk]:
        asked = GenerateCall(**{"prompt": TokenPrompt(token_ids=[1]), "num_bytes": 1, **call})
        return [chunk async for chunk in made.generate(asked)]

    return list(run(collect()))


def speak(token_ids: list[int]) -> Any:
    """A router that answers with these tokens one by one, wherever it is asked to go on."""

    async def script(attempt: Attempt) -> CallEnd:
        for position in range(len(attempt.request.resume_ids), len(token_ids)):
            is_last = position == len(token_ids) - 1
            attempt.send(token_ids[position], finish_reason=FinishReason.LENGTH if is_last else None)
            await asyncio.sleep(0)
        return CallEnd(finish_reason=FinishReason.LENGTH)

    return script


def test_only_the_first_chunk_tells_id_and_seed_and_only_the_last_the_usage(tokenizer: Tokenizer) -> None:
    made = generator(tokenizer, ScriptedRouters([serve_whole]))
    chunks = chunks_of(made, n=2, seed=5, request_id="r")
    assert [chunk.request_id for chunk in chunks if chunk.request_id] == ["r"]
    assert (chunks[0].request_id, chunks[0].seed) == ("r", 5)
    assert [chunk.usage for chunk in chunks[:-1] if chunk.usage is not None] == []
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (1, 2 * NUM_TOKENS)


def test_all_choices_and_attempts_of_a_request_are_of_the_version_that_it_began_with(tokenizer: Tokenizer) -> None:
    weights = ServedWeights({"served": 3, "wanted": [3]})
    requests = OpenRequests()

    async def switch_then_die(attempt: Attempt) -> CallEnd:
        weights.take({"served": 4, "wanted": [3, 4]})
        assert requests.weights_versions == {3}
        return await serve_two_then_die(attempt)

    routers = ScriptedRouters([switch_then_die, switch_then_die, serve_whole])
    made = generator(tokenizer, routers, weights=weights, requests=requests)
    chunks = chunks_of(made, n=2)
    assert [request.weights_version for request in routers.requests] == [3] * 4
    assert [chunk.weights_version for chunk in chunks if chunk.weights_version is not None] == [3]
    assert requests.weights_versions == frozenset()
    assert chunks_of(made)[0].weights_version == 4


def test_a_request_is_resumed_with_its_own_version_or_not_at_all(tokenizer: Tokenizer) -> None:
    weights = ServedWeights({"served": 4, "wanted": [3, 4]})
    routers = ScriptedRouters([serve_whole])
    made = generator(tokenizer, routers, weights=weights)
    resumed = {0: ResumedChoice(token_ids=[0, 1], finished=False)}
    chunks_of(made, resumed=resumed, weights_version=3)
    assert routers.requests[-1].weights_version == 3
    weights.take({"served": 4, "wanted": [4]})
    with pytest.raises(ServiceError, match="weights_version: 3 is not served any more"):
        chunks_of(made, resumed=resumed, weights_version=3)


def test_text_never_ends_inside_a_character(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode(TEXT)
    assert len(token_ids) > len(TEXT)
    chunks = chunks_of(generator(tokenizer, ScriptedRouters([speak(token_ids)])))
    assert "".join(chunk.text for chunk in chunks) == TEXT
    assert all("\ufffd" not in chunk.text for chunk in chunks)


def test_a_character_that_never_ends_becomes_a_replacement_at_the_end(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode(TEXT)[:3]
    chunks = chunks_of(generator(tokenizer, ScriptedRouters([speak(token_ids)])))
    assert "".join(chunk.text for chunk in chunks) == "tr\ufffd"


@pytest.mark.parametrize("num_resumed", range(1, 7))
def test_text_of_a_resumed_stream_goes_on_after_the_text_of_its_tokens(tokenizer: Tokenizer, num_resumed: int) -> None:
    token_ids = tokenizer.encode(TEXT)
    detokenizer = tokenizer.detokenizer()
    sent = detokenizer.push(token_ids[:num_resumed])
    resumed = {0: ResumedChoice(token_ids=token_ids[:num_resumed], finished=False)}
    chunks = chunks_of(generator(tokenizer, ScriptedRouters([speak(token_ids)])), resumed=resumed)
    assert sent + "".join(chunk.text for chunk in chunks) == TEXT


def test_a_lost_router_does_not_show_in_ids_or_text(tokenizer: Tokenizer) -> None:
    calm = chunks_of(generator(tokenizer, ScriptedRouters([serve_whole])))
    rough = chunks_of(generator(tokenizer, ScriptedRouters([serve_two_then_die, serve_whole])))
    for field in ("token_ids", "text"):
        joined = [
            [part for chunk in chunks for part in (chunk.text if field == "text" else chunk.delta.token_ids)]
            for chunks in (calm, rough)
        ]
        assert joined[0] == joined[1]


def test_a_client_that_has_everything_hears_only_that(tokenizer: Tokenizer) -> None:
    routers = ScriptedRouters([serve_whole])
    resumed = {0: ResumedChoice(token_ids=[5, 6], finished=True)}
    [chunk] = chunks_of(generator(tokenizer, routers), resumed=resumed, seed=3, request_id="r")
    assert (chunk.request_id, chunk.seed, chunk.delta.token_ids) == ("r", 3, ())
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens == 2
    assert routers.requests == []


def test_two_submissions_of_one_request_have_different_names_for_the_engine(tokenizer: Tokenizer) -> None:
    routers = ScriptedRouters([serve_whole])
    for _ in range(2):
        chunks_of(generator(tokenizer, routers), request_id="r")
    first, second = (request.request_id for request in routers.requests)
    assert first != second
    assert first.startswith("r/")


def test_what_is_wrong_with_a_call_is_told_before_any_router_hears_of_it(tokenizer: Tokenizer) -> None:
    routers = ScriptedRouters([serve_whole])
    with pytest.raises(ServiceError, match="token id below 512, not 512") as failure:
        chunks_of(generator(tokenizer, routers), prompt=TokenPrompt(token_ids=[512]))
    assert failure.value.code is StatusCode.INVALID_ARGUMENT
    assert routers.requests == []


def test_a_long_text_is_tokenized_as_a_short_one(tokenizer: Tokenizer) -> None:
    routers = ScriptedRouters([serve_whole])
    for num_bytes in (10, 100_000):
        chunks_of(generator(tokenizer, routers), prompt=TextPrompt(text=TEXT), num_bytes=num_bytes)
    first, second = (request.prompt_ids for request in routers.requests)
    assert first == second == tokenizer.encode_prompt(TEXT)


def test_seeds_that_gateways_draw_are_reproducible_only_when_told_so() -> None:
    def draw(seed: int | None, index: int) -> list[int]:
        source = SeedSource(seed, gateway_index=index)
        return [source.draw() for _ in range(3)]

    assert draw(1, 0) == draw(1, 0)
    assert draw(1, 0) != draw(1, 1)
    assert draw(None, 0) != draw(None, 0)


def never_ending(text: str, tokenizer: Tokenizer) -> Any:
    """A router that says the text again and again until it is told to stop."""
    token_ids = tokenizer.encode(text)

    async def script(attempt: Attempt) -> CallEnd:
        position = len(attempt.request.resume_ids)
        while not attempt.aborted.is_set():
            attempt.send(token_ids[position % len(token_ids)])
            position += 1
            await asyncio.sleep(0)
        return CallEnd(finish_reason=FinishReason.ABORT)

    return script


def test_a_stop_string_ends_the_choice_and_its_sequence(tokenizer: Tokenizer) -> None:
    routers = ScriptedRouters([never_ending("one llama, two llamas. ", tokenizer)])
    chunks = chunks_of(generator(tokenizer, routers), stop=("ma,", "two"))
    assert "".join(chunk.text for chunk in chunks) == "one lla"
    token_ids = [token_id for chunk in chunks for token_id in chunk.delta.token_ids]
    assert token_ids == tokenizer.encode("one llama,")
    assert chunks[-1].delta.finish_reason is FinishReason.STOP
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == len(token_ids)
    assert [attempt.aborted.is_set() for attempt in routers.attempts] == [True]
    assert routers.num_aborted == 0, "the call ends by itself"
    assert routers.streams == {}


def test_a_stop_string_stays_in_the_text_on_request(tokenizer: Tokenizer) -> None:
    routers = ScriptedRouters([never_ending("one llama, two llamas. ", tokenizer)])
    chunks = chunks_of(generator(tokenizer, routers), stop=("two",), include_stop_str_in_output=True)
    assert "".join(chunk.text for chunk in chunks) == "one llama, two"


def test_a_stop_string_does_not_count_before_min_tokens(tokenizer: Tokenizer) -> None:
    routers = ScriptedRouters([never_ending("a.", tokenizer)])
    chunks = chunks_of(generator(tokenizer, routers), stop=(".",), sampling={"min_tokens": 4})
    assert "".join(chunk.text for chunk in chunks) == "a.a.a"


def test_each_choice_has_its_own_stop(tokenizer: Tokenizer) -> None:
    async def speak_by_index(attempt: Attempt) -> CallEnd:
        words = ("x end y", "longer end z")[attempt.request.params.choice_index]
        return await speak(tokenizer.encode(words))(attempt)  # type: ignore[no-any-return]

    chunks = chunks_of(generator(tokenizer, ScriptedRouters([speak_by_index])), stop=("end",), n=2)
    texts = ["".join(chunk.text for chunk in chunks if chunk.delta.choice_index == index) for index in (0, 1)]
    assert texts == ["x ", "longer "]


@pytest.mark.parametrize("num_resumed", range(1, 6))
def test_a_stop_string_is_found_wherever_the_stream_broke(tokenizer: Tokenizer, num_resumed: int) -> None:
    """The client's half of the text and the rest are what an unbroken stream would have said."""
    token_ids = tokenizer.encode("ab END cd")
    routers = ScriptedRouters([speak(token_ids)])
    sent = "ab "[:num_resumed]
    resumed = {0: ResumedChoice(token_ids=token_ids[:num_resumed], finished=False)}
    chunks = chunks_of(generator(tokenizer, routers), stop=("END",), resumed=resumed)
    assert sent + "".join(chunk.text for chunk in chunks) == "ab "
    assert chunks[-1].delta.finish_reason is FinishReason.STOP


def test_a_stream_whose_resumed_tokens_hold_the_stop_ends_without_a_router(tokenizer: Tokenizer) -> None:
    routers = ScriptedRouters([serve_whole])
    token_ids = tokenizer.encode("ab END c")
    resumed = {0: ResumedChoice(token_ids=token_ids, finished=False)}
    [chunk] = chunks_of(generator(tokenizer, routers), stop=("END",), resumed=resumed, request_id="r")
    assert (chunk.request_id, chunk.text, chunk.delta.token_ids) == ("r", "", ())
    assert chunk.delta.finish_reason is FinishReason.STOP
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens == len(token_ids)
    assert routers.requests == []


def test_a_router_that_is_lost_is_not_replaced_after_the_stop(tokenizer: Tokenizer) -> None:
    async def stop_then_die(attempt: Attempt) -> CallEnd:
        attempt.send(*tokenizer.encode("x END y"))
        raise RouterLostError("killed")

    routers = ScriptedRouters([stop_then_die])
    chunks = chunks_of(generator(tokenizer, routers), stop=("END",))
    assert "".join(chunk.text for chunk in chunks) == "x "
    assert len(routers.requests) == 1


def test_stop_strings_are_refused_where_there_is_no_text(tmp_path: Path) -> None:
    made = generator(Tokenizer(tmp_path), ScriptedRouters([serve_whole]))
    with pytest.raises(ServiceError, match=r"stop must be empty .* without a tokenizer\.json") as failure:
        chunks_of(made, stop=("END",))
    assert failure.value.code is StatusCode.INVALID_ARGUMENT


def chat(*turns: tuple[str, str]) -> ChatPrompt:
    return ChatPrompt(messages=tuple(ChatMessage.of_text(*turn) for turn in turns or [("user", "hi")]))


@pytest.mark.parametrize(
    ("sampling", "stop_token_ids"),
    [
        ({}, (EOM, EOT)),
        ({"stop_token_ids": (7, EOT)}, (7, EOT, EOM, EOT)),
        ({"ignore_eos": True}, ()),
        ({"ignore_eos": True, "stop_token_ids": (7,)}, (7,)),
    ],
)
def test_a_chats_answer_ends_with_either_end_of_a_turn_whatever_the_checkpoint_says(
    tokenizer: Tokenizer, sampling: dict[str, Any], stop_token_ids: tuple[int, ...]
) -> None:
    routers = ScriptedRouters([serve_whole])
    chunks_of(generator(tokenizer, routers), prompt=chat(), sampling=sampling)
    assert routers.requests[0].params.stop_token_ids == stop_token_ids


def test_only_a_chats_answer_ends_with_a_turn(tokenizer: Tokenizer) -> None:
    routers = ScriptedRouters([serve_whole])
    chunks_of(generator(tokenizer, routers), prompt=TextPrompt(text="hi"))
    assert routers.requests[0].params.stop_token_ids == ()


def test_an_operators_template_renders_the_chat(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ bos_token }}{% if messages | length > 1 %}{{ raise_exception('one message') }}{% endif %}!")
    routers = ScriptedRouters([serve_whole])
    made = generator(tokenizer, routers, encode_chat=chat_encoder(tokenizer, str(template)))
    chunks_of(made, prompt=chat())
    assert routers.requests[0].prompt_ids == [SPECIAL_TOKENS["<|begin_of_text|>"], ord("!")]
    with pytest.raises(ServiceError, match="messages are refused by the chat template: one message") as failure:
        chunks_of(made, prompt=chat(("user", "a"), ("user", "b")))
    assert failure.value.code is StatusCode.INVALID_ARGUMENT


def test_without_a_tokenizer_ids_are_served_and_text_and_chat_are_refused_with_the_reason(tmp_path: Path) -> None:
    made = generator(Tokenizer(tmp_path), ScriptedRouters([serve_whole]))
    chunks = chunks_of(made, prompt=TokenPrompt(token_ids=[1, 2]))
    assert [token_id for chunk in chunks for token_id in chunk.delta.token_ids] == list(range(NUM_TOKENS))
    assert "".join(chunk.text for chunk in chunks) == ""
    for prompt in (TextPrompt(text="hi"), chat()):
        with pytest.raises(ServiceError, match=r"has no tokenizer\.json") as failure:
            chunks_of(made, prompt=prompt)
        assert failure.value.code is StatusCode.INVALID_ARGUMENT


def test_without_llama_4s_special_tokens_ids_and_text_are_served_and_chat_is_refused_with_the_reason(
    tmp_path: Path,
) -> None:
    inner = build_tokenizer()
    plain = tokenizers.Tokenizer(inner.model)
    plain.pre_tokenizer, plain.decoder = inner.pre_tokenizer, inner.decoder
    plain.save(str(tmp_path / "tokenizer.json"))
    routers = ScriptedRouters([speak(list(b"llama"))])
    made = generator(Tokenizer(tmp_path), routers)
    for prompt in (TextPrompt(text="hi"), TokenPrompt(token_ids=list(b"hi"))):
        assert "".join(chunk.text for chunk in chunks_of(made, prompt=prompt)) == "llama"
    assert [request.prompt_ids for request in routers.requests] == [list(b"hi")] * 2
    with pytest.raises(
        ServiceError, match=r"chat is not possible .* <\|begin_of_text\|>, <\|header_start\|>"
    ) as failure:
        chunks_of(made, prompt=chat())
    assert failure.value.code is StatusCode.INVALID_ARGUMENT


def test_tokens_beyond_the_tokenizer_are_tokens_like_others_without_a_text(tokenizer: Tokenizer) -> None:
    """In the prompt, in the output, among the log probabilities, next to a stop string."""
    beyond = LIMITS.vocab_size - 1
    assert tokenizer.num_tokens <= beyond
    logprobs = [
        TokenLogprobs(token_id=token_id, logprob=-1.0, top=[(beyond, -0.5), (token_id, -1.0)])
        for token_id in (ord("a"), beyond, ord("b"), ord("c"))
    ]

    async def speak_beyond(attempt: Attempt) -> CallEnd:
        token_ids = [entry.token_id for entry in logprobs]
        attempt.send(*token_ids, finish_reason=FinishReason.LENGTH, logprobs=logprobs)
        return CallEnd(finish_reason=FinishReason.LENGTH)

    made = generator(tokenizer, ScriptedRouters([speak_beyond]))
    [chunk] = chunks_of(made, prompt=TokenPrompt(token_ids=[beyond]), sampling={"logprobs": 1}, stop=("bc",))
    assert (chunk.text, chunk.delta.token_ids) == ("a", (ord("a"), beyond, ord("b"), ord("c")))
    assert chunk.delta.logprobs == tuple(logprobs)
    assert made.decode([ord("a"), beyond], keep_special_tokens=True) == "a"
    with pytest.raises(ValueError, match=f"token_ids must be below {LIMITS.vocab_size}, not {LIMITS.vocab_size}"):
        made.decode([LIMITS.vocab_size], keep_special_tokens=False)


def test_what_a_request_brought_is_counted_with_the_last_chunk_and_its_end(tokenizer: Tokenizer) -> None:
    requests = OpenRequests()
    made = generator(tokenizer, ScriptedRouters([serve_two_then_die, serve_whole]), requests=requests)
    resumed = {1: ResumedChoice(token_ids=[100, 101], finished=False)}
    chunks_of(made, n=2, resumed=resumed)
    report = requests.report()
    counted = {name: sum(series.values()) for name, series in report.metrics.numbers.items()}
    assert counted["vllm:prompt_tokens"] == 1
    assert counted["vllm:generation_tokens"] == 2 * NUM_TOKENS - 2, "the client had two of them"
    assert report.metrics.numbers["vllm:request_success"][("length",)] == 2
    assert counted["arriero:resubmissions"] >= 1
    assert report.num_open_choices == 0


@pytest.mark.parametrize("call", [{"n": 0}, {"prompt": TokenPrompt(token_ids=[9999])}])
def test_what_is_refused_is_counted_as_that_and_nothing_else(tokenizer: Tokenizer, call: dict[str, Any]) -> None:
    requests = OpenRequests()
    with pytest.raises(ServiceError):
        chunks_of(generator(tokenizer, ScriptedRouters([serve_whole]), requests=requests), **call)
    counted = {name: sum(series.values()) for name, series in requests.report().metrics.numbers.items()}
    assert {name: count for name, count in counted.items() if count} == {"arriero:request_errors": 1}


def test_a_failure_of_ours_is_told_as_internal(tokenizer: Tokenizer) -> None:
    async def stumble(attempt: Attempt) -> CallEnd:
        raise KeyError("a secret")

    with recorded("arriero.gateway") as lines, pytest.raises(ServiceError) as failure:
        chunks_of(generator(tokenizer, ScriptedRouters([stumble])), request_id="mine")
    assert (failure.value.code, failure.value.message) == (StatusCode.INTERNAL, "internal error")
    assert [fields_of(line)["request_id"] for line in lines] == ["mine"]
