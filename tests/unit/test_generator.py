"""From a client's call to chunks, against scripted routers and the real tokenizer."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from log_records import fields_of, recorded
from scripted_routers import NUM_TOKENS, Attempt, ScriptedRouters, serve_two_then_die, serve_whole

from cluster.checkpoints.presets import create_checkpoint
from cluster.front.admission import ServiceLimits
from cluster.front.errors import ServiceError, StatusCode
from cluster.front.generate_call import Chunk, GenerateCall, ResumedChoice, TextPrompt, TokenPrompt
from cluster.front.generator import Generator, SeedSource
from cluster.front.open_requests import OpenRequests
from cluster.front.relay import CallEnd, RelayLimits
from cluster.front.tokenizer import Tokenizer
from router.messages import FinishReason

LIMITS = ServiceLimits(max_model_len=256, vocab_size=512, max_logprobs=5, max_choices=4, max_request_bytes=1_000_000)
TEXT = "tränen"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(create_checkpoint("tiny-maverick", tmp_path_factory.mktemp("m") / "m"))


def generator(
    tokenizer: Tokenizer,
    routers: ScriptedRouters,
    *,
    seed: int | None = None,
    requests: OpenRequests | None = None,
) -> Generator:
    return Generator(
        tokenizer=tokenizer,
        limits=LIMITS,
        routers=routers,
        tokens=routers,
        relay_limits=RelayLimits(stream_interval_s=0.0, resubmit_timeout_s=5.0),
        seeds=SeedSource(seed, gateway_index=0),
        requests=requests,
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
