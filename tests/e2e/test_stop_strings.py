"""Stop strings against a real engine, which knows nothing of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import grpc
import pytest
from answers import TIMEOUT_S
from conftest import Service
from engine_watch import EngineWatch
from tiny_models import prompt

from cluster.client import CHANNEL_OPTIONS
from cluster.client_codec import generate_request, piece_of
from cluster.client_types import Piece, Sampling
from cluster.v1 import generation_pb2, generation_pb2_grpc

PROMPT = prompt(20, seed=3)
SEED = 3
WHOLE = Sampling(max_tokens=200, ignore_eos=True)
# Far more than a test would wait for.
ENDLESS = Sampling(max_tokens=4000, ignore_eos=True)


def pieces_of(service: Service, sampling: Sampling, resume_ids: Sequence[int] = ()) -> list[Piece]:
    request = generate_request(PROMPT, sampling)
    request.seed = SEED
    if resume_ids:
        request.resume_token_ids.append(generation_pb2.ResumedChoice(choice_index=0, token_ids=resume_ids))
    with grpc.insecure_channel(service.cluster.grpc_address, options=CHANNEL_OPTIONS) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        responses = stub.Generate(request, metadata=service.metadata, timeout=TIMEOUT_S)
        return [piece_of(response) for response in responses]


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def token_ids_of(pieces: Sequence[Piece]) -> list[int]:
    return [token_id for piece in pieces for token_id in piece.token_ids]


@pytest.fixture(scope="module")
def stop(service: Service) -> str:
    """What the undisturbed text says rather late, and for the first time there."""
    text = text_of(pieces_of(service, WHOLE))
    return next(
        word for begin in range(len(text) // 2, len(text)) if text.find(word := text[begin : begin + 4]) == begin
    )


@pytest.mark.parametrize("include", [False, True])
def test_a_choice_ends_where_its_text_does(service: Service, stop: str, include: bool) -> None:
    whole = pieces_of(service, WHOLE)
    pieces = pieces_of(service, replace(ENDLESS, stop=("\0 never \0", stop), include_stop_str_in_output=include))
    before, _, _ = text_of(whole).partition(stop)
    assert text_of(pieces) == before + (stop if include else "")
    assert pieces[-1].finish_reason == "stop"
    token_ids = token_ids_of(pieces)
    assert token_ids == token_ids_of(whole)[: len(token_ids)]
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == len(token_ids)
    EngineWatch(service).wait_until_idle()


def test_a_stream_that_broke_anywhere_stops_at_the_same_place(service: Service, stop: str) -> None:
    sampling = replace(ENDLESS, stop=(stop,))
    pieces = pieces_of(service, sampling)
    token_ids = token_ids_of(pieces)
    sent = dict(
        zip(accumulate(len(piece.token_ids) for piece in pieces), accumulate(p.text for p in pieces), strict=True)
    )
    for num_resumed in (1, len(token_ids) - 3, len(token_ids) - 2, len(token_ids) - 1, len(token_ids)):
        rest = pieces_of(service, sampling, token_ids[:num_resumed])
        assert token_ids[:num_resumed] + token_ids_of(rest) == token_ids
        assert rest[-1].finish_reason == "stop"
        assert text_of(pieces).endswith(text_of(rest))
        if num_resumed in sent:
            assert sent[num_resumed] + text_of(rest) == text_of(pieces)
