"""The whole service against transformers: log probabilities over the full vocabulary, as clients get them by gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from answers import Ask, ask, ask_all, ask_to_resume
from conftest import RunApp, Service, Tell
from oracle_rows import max_difference
from tiny_models import TINY_CONFIGS, TOLERANCE, TinyModel, make_tiny, prompt

from cluster.client_types import Sampling

NAMES = ("scout", "maverick", "smooth_rope", "topk2")
PROMPT_LENGTHS = (53, 60, 71, 77, 90)
# Divides neither a prompt, nor an attention chunk, nor a block: chunks of all sizes come about.
MAX_NUM_BATCHED_TOKENS = 23


def everything(num_tokens: int) -> Sampling:
    return Sampling(max_tokens=num_tokens, ignore_eos=True, logprobs=-1, prompt_logprobs=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    tiny: TinyModel
    service: Service


@pytest.fixture(scope="module", params=NAMES)
def served(
    request: pytest.FixtureRequest, run_app: RunApp, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    tiny = make_tiny(TINY_CONFIGS[request.param], tmp_path_factory.mktemp(request.param))
    config = {"model": str(tiny.folder), "routers": 1, "shards": 3, "max_logprobs": -1, "max_model_len": 256}
    with run_app(f"parity-{request.param}", **config, max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS) as service:
        yield Served(tiny=tiny, service=service)


def test_prompts_that_share_uneven_chunks_agree_with_transformers(served: Served, tell: Tell) -> None:
    prompts = [prompt(length, seed=length) for length in PROMPT_LENGTHS]
    answers = ask_all(served.service, [Ask(prompt_ids=ids, sampling=everything(4)) for ids in prompts])
    assert [len(answer.prompt_logprobs) for answer in answers] == [length - 1 for length in PROMPT_LENGTHS]
    assert [len(answer.logprobs) for answer in answers] == [4] * len(prompts)
    worst = max(max_difference(served.tiny, ids, answer) for ids, answer in zip(prompts, answers, strict=True))
    tell(f"largest difference {worst:.1e}")
    assert worst <= TOLERANCE


def test_token_by_token_agrees_with_transformers(served: Served, tell: Tell) -> None:
    asks = [
        Ask(prompt_ids=prompt(1, seed=length), sampling=everything(length - 1), seed=length)
        for length in PROMPT_LENGTHS
    ]
    answers = ask_all(served.service, asks)
    assert [len(answer.logprobs) for answer in answers] == [length - 1 for length in PROMPT_LENGTHS]
    worst = max(max_difference(served.tiny, one.prompt_ids, answer) for one, answer in zip(asks, answers, strict=True))
    tell(f"largest difference {worst:.1e}")
    assert worst <= TOLERANCE


def test_a_resumed_answer_agrees_with_transformers_and_with_itself(served: Served) -> None:
    request = Ask(prompt_ids=prompt(53, seed=1), sampling=everything(30), seed=11)
    whole = ask(served.service, request)
    for num_resumed in (1, 14):
        resumed_ids = whole.token_ids[:num_resumed]
        rest = ask_to_resume(served.service, request, resumed_ids)
        assert max_difference(served.tiny, request.prompt_ids, rest, resumed_ids=resumed_ids) <= TOLERANCE
        assert rest.logprobs == whole.logprobs[num_resumed:]
