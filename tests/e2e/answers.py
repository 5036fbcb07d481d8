"""Requests sent at once, each from a thread of its own, and their answers as one comparable value per choice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from conftest import Service

from cluster.client import CHANNEL_OPTIONS, ArrieroClient
from cluster.client_codec import generate_request, piece_of
from cluster.client_types import FinishReason, Piece, Sampling, TokenLogprobs, Usage
from cluster.v1 import generation_pb2, generation_pb2_grpc

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request. A cache_salt of its own keeps it from the prefixes that others have computed."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    seed: int = 0
    n: int = 1
    cache_salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One choice. Equal answers are equal bit for bit, log probabilities included."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None


def ask(service: Service, request: Ask) -> Answer:
    """The only choice of one request."""
    [answer] = ask_choices(service, request)
    return answer


def ask_choices(service: Service, request: Ask) -> list[Answer]:
    with service.client() as client:
        return answers_of(_pieces(client, request), request.n)


def ask_all(service: Service, requests: Sequence[Ask]) -> list[Answer]:
    """The only choice of each request, all open at the same time."""
    return [answer for answer, _ in ask_all_with_usage(service, requests)]


def ask_all_with_usage(service: Service, requests: Sequence[Ask]) -> list[tuple[Answer, Usage]]:
    with service.client() as client, ThreadPoolExecutor(len(requests)) as threads:
        streams = list(threads.map(lambda request: _pieces(client, request), requests))
    return [(answers_of(pieces, 1)[0], usage_of(pieces)) for pieces in streams]


def ask_to_resume(service: Service, request: Ask, resume_ids: Sequence[int]) -> Answer:
    """What follows resume_ids, of a client that says it already has them."""
    message = generate_request(request.prompt_ids, request.sampling)
    message.seed = request.seed
    message.resume_token_ids.append(generation_pb2.ResumedChoice(choice_index=0, token_ids=resume_ids))
    with grpc.insecure_channel(service.cluster.grpc_address, options=CHANNEL_OPTIONS) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        responses = list(stub.Generate(message, metadata=service.metadata, timeout=TIMEOUT_S))
    return answers_of([piece_of(response) for response in responses], 1)[0]


def answers_of(pieces: Iterable[Piece], num_choices: int) -> list[Answer]:
    pieces = list(pieces)
    return [_answer([piece for piece in pieces if piece.choice_index == index]) for index in range(num_choices)]


def usage_of(pieces: Sequence[Piece]) -> Usage:
    usage = pieces[-1].usage
    assert usage is not None
    return usage


def _pieces(client: ArrieroClient, request: Ask) -> list[Piece]:
    stream = client.generate(
        request.prompt_ids,
        sampling=request.sampling,
        seed=request.seed,
        n=request.n,
        cache_salt=request.cache_salt,
        timeout_s=TIMEOUT_S,
    )
    return list(stream)


def _answer(pieces: Sequence[Piece]) -> Answer:
    assert not any(piece.degraded for piece in pieces)
    return Answer(
        token_ids=tuple(token_id for piece in pieces for token_id in piece.token_ids),
        logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
        prompt_logprobs=tuple(entry for piece in pieces for entry in piece.prompt_logprobs),
        finish_reason=pieces[-1].finish_reason,
    )
