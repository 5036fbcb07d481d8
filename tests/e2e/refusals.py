"""Requests that the service must refuse, and what its refusal must say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.v1 import generation_pb2

VOCAB_SIZE = 512
MAX_MODEL_LEN = 4096
LARGEST_UINT32 = 2**32 - 1
SMALLEST_INT32, LARGEST_INT32 = -(2**31), 2**31 - 1
NOT_FINITE = (math.nan, math.inf, -math.inf)

BAD_SAMPLING: Mapping[str, Sequence[Any]] = {
    "temperature": (*NOT_FINITE, -0.1, 1e6),
    "top_p": (*NOT_FINITE, 0.0, -0.5, 1.5),
    "top_k": (-1, SMALLEST_INT32),
    "min_p": (*NOT_FINITE, -0.1, 1.5),
    "repetition_penalty": (*NOT_FINITE, 0.0, -1.0, 1e6),
    "presence_penalty": (*NOT_FINITE, -2.5, 2.5),
    "frequency_penalty": (*NOT_FINITE, -2.5, 2.5),
    "logit_bias": (*({5: value} for value in (*NOT_FINITE, 1e6)), {VOCAB_SIZE: 1.0}, {LARGEST_UINT32: 1.0}),
    "stop_token_ids": ([VOCAB_SIZE], [5, LARGEST_UINT32], [5] * 2000),
    "min_tokens": (-1, SMALLEST_INT32, LARGEST_INT32),
    "max_tokens": (0, -1, SMALLEST_INT32),
    "logprobs": (-2, 21, LARGEST_INT32, SMALLEST_INT32),
    "prompt_logprobs": (-2, 21, LARGEST_INT32, SMALLEST_INT32),
    "stop": (["x"] * 17, ["x", ""], ["x" * 257]),
}
"""Every field but those that can only be true or false."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A request whose refusal, INVALID_ARGUMENT, must contain all of these words."""

    name: str
    request: generation_pb2.GenerateRequest
    words: tuple[str, ...]


def refusals() -> Iterator[Refusal]:
    yield from _of_prompts()
    yield from _of_sampling()
    yield from _of_other_fields()
    yield from _of_resumption()


def text_request(**fields: Any) -> generation_pb2.GenerateRequest:
    """Good but for the fields."""
    return generation_pb2.GenerateRequest(text="A llama", **fields)


def _of_prompts() -> Iterator[Refusal]:
    yield _refusal("no prompt", generation_pb2.GenerateRequest(), "prompt must be set", "text", "token_ids", "chat")
    yield _refusal("empty text", generation_pb2.GenerateRequest(text=""), "text", "empty")
    yield _refusal("no token ids", _token_ids([]), "prompt", "empty")
    yield _refusal("a prompt that fills the model", _token_ids([5] * MAX_MODEL_LEN), "prompt", "4096")
    yield _refusal("a text over the limit", generation_pb2.GenerateRequest(text="x" * 9000), "prompt", "9001")
    yield _refusal("a prompt of a million", _token_ids([5] * 10**6), "prompt", str(10**6))
    yield _refusal("a token id too many", _token_ids([5, VOCAB_SIZE]), "prompt[1]", str(VOCAB_SIZE))
    yield _refusal("the largest token id", _token_ids([LARGEST_UINT32]), "prompt[0]", str(LARGEST_UINT32))
    yield _refusal("no messages", generation_pb2.GenerateRequest(chat=generation_pb2.Chat()), "messages", "empty")
    yield _refusal("unknown role", _chat("root", text="Hello"), "messages[0].role", "'root'")
    yield _refusal("empty role", _chat("", text="Hello"), "messages[0].role", "''")
    url = generation_pb2.Image(url="http://127.0.0.1/x.png")
    yield _refusal("image by url", _chat("user", image=url), "messages[0].content[0]", "image")
    data = generation_pb2.Image(data=b"\x89PNG\r\n\x1a\n")
    yield _refusal("image as bytes", _chat("user", image=data), "messages[0].content[0]", "image")


def _of_sampling() -> Iterator[Refusal]:
    for field, values in BAD_SAMPLING.items():
        for value in values:
            request = text_request(sampling=generation_pb2.SamplingParams(**{field: value}))
            yield _refusal(f"{field} {_shown(value)}", request, field, _shown(value))


def _of_other_fields() -> Iterator[Refusal]:
    for n in (0, -1, 65, LARGEST_INT32, SMALLEST_INT32):
        yield _refusal(f"n {n}", text_request(n=n), "n must be", str(n))
    for seed in (2**63, 2**64 - 1):
        yield _refusal(f"seed {seed}", text_request(seed=seed), "seed", str(seed))
    for field in ("request_id", "cache_salt"):
        yield _refusal(f"long {field}", text_request(**{field: "x" * 257}), field, "256")
        yield _refusal(f"unprintable {field}", text_request(**{field: "a\nb\0"}), field, r"'a\nb\x00'")
    yield _refusal("policy 99", text_request(on_missing_expert=99), "on_missing_expert", "99")


def _of_resumption() -> Iterator[Refusal]:
    for index in (1, -1, SMALLEST_INT32):
        yield _refusal(f"resumed choice {index}", _resumed((index, [5])), "choice_index", str(index))
    yield _refusal("a choice resumed twice", _resumed((0, [5]), (0, [6])), "choice_index", "0")
    for token_id in (VOCAB_SIZE, LARGEST_UINT32):
        yield _refusal(f"resumed {token_id}", _resumed((0, [5, token_id])), "resume_token_ids", str(token_id))
    yield _refusal("too much resumed", _resumed((0, [5] * MAX_MODEL_LEN)), "resume_token_ids", "at most")


def _refusal(name: str, request: generation_pb2.GenerateRequest, *words: str) -> Refusal:
    return Refusal(name=name, request=request, words=words)


def _token_ids(ids: Sequence[int]) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=ids))


def _chat(role: str, **part: Any) -> generation_pb2.GenerateRequest:
    message = generation_pb2.ChatMessage(role=role, content=[generation_pb2.ContentPart(**part)])
    return generation_pb2.GenerateRequest(chat=generation_pb2.Chat(messages=[message]))


def _resumed(*choices: tuple[int, Sequence[int]]) -> generation_pb2.GenerateRequest:
    resumed = [generation_pb2.ResumedChoice(choice_index=index, token_ids=ids) for index, ids in choices]
    return text_request(resume_token_ids=resumed)


def _shown(value: Any) -> str:
    """What of a value a refusal must name: of many, the bad one, or their number."""
    match value:
        case dict():
            [(token_id, bias)] = value.items()
            return str(token_id) if token_id >= VOCAB_SIZE else str(bias)
        case [str(), *_]:
            return str(len(value)) if len(value) > 2 else str(len(value[-1]))
        case list():
            return str(max(value)) if max(value) >= VOCAB_SIZE else str(len(value))
        case _:
            return str(value)
