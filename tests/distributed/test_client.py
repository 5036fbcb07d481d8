"""The Python client against a real gRPC server, over connections that break."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from cuttable_proxy import CuttableProxy
from scripted_service import DRAWN_REQUEST_ID, DRAWN_SEED, WEIGHTS_VERSION, Script, made_up_token, start

from cluster.client import ArrieroClient
from cluster.client_types import ArrieroError, Piece, RetryPolicy, Sampling
from cluster.front.chat import ChatMessage, ImagePart, TextPart

NUM_TOKENS = 12
TIME_LIMIT_S = 20.0
QUICK = RetryPolicy(max_tries=4, initial_backoff_s=0.01, max_backoff_s=0.05)
RESUMABLE = ["UNAVAILABLE", "INTERNAL", "UNKNOWN", "CANCELLED", "RESOURCE_EXHAUSTED"]
FINAL = ["INVALID_ARGUMENT", "UNAUTHENTICATED", "NOT_FOUND", "DEADLINE_EXCEEDED"]


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def proxy(script: Script) -> Iterator[CuttableProxy]:
    server, port = start(script)
    proxy = CuttableProxy(port)
    yield proxy
    proxy.close()
    server.stop(grace=None).wait()


@pytest.fixture
def client(proxy: CuttableProxy) -> Iterator[ArrieroClient]:
    with ArrieroClient(f"127.0.0.1:{proxy.port}", retry=QUICK) as client:
        yield client


def aborting(code: str) -> Callable[[grpc.ServicerContext], None]:
    return lambda context: context.abort(grpc.StatusCode[code], f"scripted {code}")


def tokens(pieces: list[Piece], choice_index: int = 0) -> list[int]:
    return [token for piece in pieces if piece.choice_index == choice_index for token in piece.token_ids]


def undisturbed(seed: int, choice_index: int = 0) -> list[int]:
    return [made_up_token(seed, choice_index, position) for position in range(NUM_TOKENS)]


def sampling(**fields: int) -> Sampling:
    return Sampling(max_tokens=NUM_TOKENS, **fields)  # type: ignore[arg-type]


def test_an_undisturbed_stream_is_one_call(client: ArrieroClient, script: Script) -> None:
    stream = client.generate("hi", sampling=sampling(), timeout_s=TIME_LIMIT_S)
    pieces = list(stream)
    assert (stream.request_id, stream.seed) == (DRAWN_REQUEST_ID, DRAWN_SEED)
    assert tokens(pieces) == undisturbed(DRAWN_SEED)
    assert "".join(piece.text for piece in pieces).split() == [str(token) for token in undisturbed(DRAWN_SEED)]
    assert pieces[-1].finish_reason == "length"
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == NUM_TOKENS
    assert len(script.requests) == 1


@pytest.mark.parametrize("code", RESUMABLE)
def test_a_stream_that_fails_midway_goes_on_with_the_token_after(
    client: ArrieroClient, script: Script, code: str
) -> None:
    script.fail, script.fail_after = [aborting(code), aborting(code)], [5, 2]
    pieces = list(client.generate("hi", sampling=sampling(), timeout_s=TIME_LIMIT_S))
    assert tokens(pieces) == undisturbed(DRAWN_SEED)
    assert [len(choice.token_ids) for request in script.requests for choice in request.resume_token_ids] == [5, 7]
    for resumed in script.requests[1:]:
        assert (resumed.request_id, resumed.seed, resumed.text) == (DRAWN_REQUEST_ID, DRAWN_SEED, "hi")
        assert resumed.weights_version == WEIGHTS_VERSION, "others would go on differently"


def test_a_cut_connection_is_resumed(client: ArrieroClient, proxy: CuttableProxy, script: Script) -> None:
    # The server waits until its connection is gone: the client cannot have had more than four tokens.
    gone = threading.Event()

    def wait_for_the_cut(context: grpc.ServicerContext) -> None:
        assert context.add_callback(gone.set)
        assert gone.wait(TIME_LIMIT_S)

    script.fail, script.fail_after = [wait_for_the_cut], [4]
    pieces = []
    for piece in client.generate("hi", sampling=sampling(), timeout_s=TIME_LIMIT_S):
        pieces.append(piece)
        if len(pieces) == 4:
            proxy.cut()
    assert proxy.num_cut == 1
    assert gone.is_set()
    assert tokens(pieces) == undisturbed(DRAWN_SEED)
    assert list(script.requests[1].resume_token_ids[0].token_ids) == undisturbed(DRAWN_SEED)[:4]


def test_a_stream_that_ends_politely_but_too_early_is_resumed(client: ArrieroClient, script: Script) -> None:
    script.fail, script.fail_after = [lambda context: None], [3]
    assert tokens(list(client.generate("hi", sampling=sampling()))) == undisturbed(DRAWN_SEED)
    assert len(script.requests) == 2


def test_a_call_that_fails_before_its_first_response_is_sent_again_as_it_was(
    client: ArrieroClient, script: Script
) -> None:
    script.fail, script.fail_after = [aborting("UNAVAILABLE")], [-1]
    pieces = list(client.generate("hi", sampling=sampling(), seed=9, request_id="mine"))
    assert tokens(pieces) == undisturbed(9)
    assert script.requests[1] == script.requests[0]


def test_every_choice_goes_on_where_it_was(client: ArrieroClient, script: Script) -> None:
    script.fail, script.fail_after = [aborting("UNAVAILABLE"), aborting("UNAVAILABLE")], [7, 16]
    pieces = list(client.generate([1, 2, 3], sampling=sampling(), n=2))
    assert [tokens(pieces, choice) for choice in (0, 1)] == [undisturbed(DRAWN_SEED, choice) for choice in (0, 1)]
    lengths = [[len(choice.token_ids) for choice in request.resume_token_ids] for request in script.requests]
    assert lengths == [[], [4, 3], [12, 11]]
    assert [choice.finished for choice in script.requests[2].resume_token_ids] == [True, False]


def test_a_break_after_the_last_token_is_no_failure(client: ArrieroClient, script: Script) -> None:
    script.fail, script.fail_after = [aborting("UNAVAILABLE")], [NUM_TOKENS + 1]
    stream = client.generate("hi", sampling=sampling())
    assert tokens(list(stream)) == undisturbed(DRAWN_SEED)
    assert len(script.requests) == 1


def test_prompt_logprobs_come_once(client: ArrieroClient, script: Script) -> None:
    script.fail, script.fail_after = [aborting("UNAVAILABLE")], [2]
    pieces = list(client.generate("hi", sampling=sampling(prompt_logprobs=2)))
    [entry] = [entry for piece in pieces for entry in piece.prompt_logprobs]
    assert entry.top == ((1, -0.5), (2, -2.0))
    assert script.requests[0].sampling.prompt_logprobs == 2
    assert not script.requests[1].sampling.HasField("prompt_logprobs")


@pytest.mark.parametrize("code", FINAL)
@pytest.mark.parametrize("fail_after", [-1, 3])
def test_a_refusal_is_final(client: ArrieroClient, script: Script, code: str, fail_after: int) -> None:
    script.fail, script.fail_after = [aborting(code)], [fail_after]
    with pytest.raises(ArrieroError, match=f"scripted {code}") as caught:
        list(client.generate("hi", sampling=sampling()))
    assert caught.value.code == code
    assert len(script.requests) == 1


def test_a_full_queue_refuses_a_new_request_at_once(client: ArrieroClient, script: Script) -> None:
    script.fail, script.fail_after = [aborting("RESOURCE_EXHAUSTED")], [-1]
    with pytest.raises(ArrieroError, match="RESOURCE_EXHAUSTED"):
        list(client.generate("hi", sampling=sampling()))
    assert len(script.requests) == 1


def test_tries_that_bring_nothing_new_are_counted_and_progress_starts_the_count_again(
    client: ArrieroClient, script: Script
) -> None:
    nothing_new = [aborting("UNAVAILABLE")] * (QUICK.max_tries - 1)
    script.fail = [*nothing_new, aborting("UNAVAILABLE"), *nothing_new]
    script.fail_after = [0] * len(nothing_new) + [2] + [0] * len(nothing_new)
    with pytest.raises(ArrieroError, match="scripted UNAVAILABLE"):
        list(client.generate("hi", sampling=sampling()))
    assert len(script.requests) == len(script.fail)


def test_the_deadline_holds_over_all_tries(proxy: CuttableProxy, script: Script) -> None:
    patient = RetryPolicy(max_tries=1000, initial_backoff_s=0.05, max_backoff_s=0.05)
    script.fail, script.fail_after = [aborting("UNAVAILABLE")] * 1000, [-1] * 1000
    began = time.monotonic()
    with (
        ArrieroClient(f"127.0.0.1:{proxy.port}", retry=patient) as client,
        # Whether it passes between two tries or in the middle of one is chance.
        pytest.raises(ArrieroError, match=r"no time left to try again|Deadline Exceeded") as caught,
    ):
        list(client.generate("hi", sampling=sampling(), timeout_s=0.4))
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert time.monotonic() - began < TIME_LIMIT_S
    assert len(script.requests) > 1


def test_a_service_that_is_not_there_is_an_error(proxy: CuttableProxy) -> None:
    proxy.close()
    with (
        ArrieroClient(f"127.0.0.1:{proxy.port}", retry=QUICK) as client,
        pytest.raises(ArrieroError, match="UNAVAILABLE"),
    ):
        next(client.generate("hi"))


def test_closing_a_stream_from_another_thread_ends_it_there_and_here(client: ArrieroClient, script: Script) -> None:
    gone = threading.Event()

    def wait_for_the_client_to_go(context: grpc.ServicerContext) -> None:
        assert context.add_callback(gone.set)
        assert gone.wait(TIME_LIMIT_S)

    script.fail, script.fail_after = [wait_for_the_client_to_go], [3]
    with client.generate("hi", sampling=sampling()) as stream:
        first = [next(stream) for _ in range(3)]
        closer = threading.Thread(target=stream.close)
        closer.start()
        assert list(stream) == []
        closer.join()
    assert tokens(first) == undisturbed(DRAWN_SEED)[:3]
    assert gone.wait(TIME_LIMIT_S)
    assert len(script.requests) == 1


def test_every_field_reaches_the_service(client: ArrieroClient, script: Script) -> None:
    asked = Sampling(
        temperature=0.0,
        top_p=0.5,
        top_k=0,
        logit_bias={5: -1.5},
        stop_token_ids=(7, 8),
        max_tokens=1,
        ignore_eos=False,
        stop=("User:", "\n"),
        include_stop_str_in_output=False,
    )
    picture = ChatMessage(role="user", content=(TextPart(text="and this?"), ImagePart(data=b"\x89PNG")))
    messages = [ChatMessage.of_text("system", "Be brief."), picture]
    list(client.generate(messages, sampling=asked, on_missing_expert="shared_only", cache_salt="tenant"))
    [request] = script.requests
    assert [message.role for message in request.chat.messages] == ["system", "user"]
    assert request.chat.messages[1].content[1].image.data == b"\x89PNG"
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("min_p")
    assert dict(request.sampling.logit_bias) == {5: -1.5}
    assert list(request.sampling.stop_token_ids) == [7, 8]
    assert list(request.sampling.stop) == ["User:", "\n"]
    assert request.sampling.HasField("include_stop_str_in_output")
    assert (request.on_missing_expert, request.cache_salt) == (3, "tenant")


def test_a_stop_string_alone_is_not_taken_for_its_characters(client: ArrieroClient, script: Script) -> None:
    with pytest.raises(TypeError, match="stop must be a tuple of strings, not the string 'END'"):
        client.generate("hi", sampling=Sampling(stop="END"))  # type: ignore[arg-type]
    assert script.requests == []


def test_the_application_is_named_to_serve(proxy: CuttableProxy, script: Script) -> None:
    with ArrieroClient(f"127.0.0.1:{proxy.port}", application="llamas") as client:
        list(client.generate("hi", sampling=sampling()))
    assert script.metadata[0]["application"] == "llamas"


def test_an_unknown_policy_is_refused_before_anything_is_sent(client: ArrieroClient, script: Script) -> None:
    with pytest.raises(ValueError, match="on_missing_expert must be one of wait, fail, shared_only, not 'pray'"):
        client.generate("hi", on_missing_expert="pray")  # type: ignore[arg-type]
    assert script.requests == []


def test_text_and_ids_go_both_ways(client: ArrieroClient) -> None:
    assert client.tokenize("hi") == (104, 105)
    assert client.detokenize([104, 105]) == "hi"
    with pytest.raises(ArrieroError, match="INVALID_ARGUMENT: text must not be empty"):
        client.tokenize("")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tries": 0}, "max_tries must be at least 1, not 0"),
        ({"initial_backoff_s": 9.0}, "initial_backoff_s must be between 0 and max_backoff_s 5.0, not 9.0"),
    ],
)
def test_a_retry_policy_out_of_range_is_refused_by_name(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetryPolicy(**fields)  # type: ignore[arg-type]


def test_the_wait_between_tries_doubles_up_to_its_limit() -> None:
    policy = RetryPolicy(initial_backoff_s=0.1, max_backoff_s=1.0)
    assert [policy.backoff_s(failures) for failures in (1, 2, 4, 5, 10_000)] == [0.1, 0.2, 0.8, 1.0, 1.0]
