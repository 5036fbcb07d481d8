"""The demo model as it lies in the repository: its files, its logits against transformers, its answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from paged_runner import make_runner
from tiny_models import TOLERANCE, TinyModel
from transformers import AutoTokenizer, Llama4ForCausalLM

from cluster.checkpoints.demo_model import demo_checkpoint
from cluster.checkpoints.demo_tasks import TASKS, Sample, held_out_samples
from cluster.config import ServiceConfig
from cluster.engine_settings import engine_settings
from cluster.front.chat import ChatMessage, encode_chat
from cluster.front.tokenizer import Tokenizer
from cluster.service_model import read_model_config, resolve
from router.engine import Engine
from router.engine_builder import build_engine
from router.messages import GenerateRequest, Start
from router.sampling_params import SamplingParams

MAX_BYTES = 12_000_000
NUM_PROMPTS = 25
NUM_RIGHT = 24
# Of questions that others came before; its README tells how much less sure the model is there.
NUM_RIGHT_LATER = 18
MAX_ANSWER_TOKENS = 16


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(demo_checkpoint())


@pytest.fixture(scope="module", params=["auto", "bfloat16"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """The default service's, with the experts in process."""
    config = ServiceConfig(shards=0, dtype=request.param, router_threads=1, num_kv_blocks=1024)
    resolved = resolve(config, read_model_config(Path(config.model)), num_cores=1)
    settings = engine_settings(resolved)
    built = build_engine(Start(router_id="demo", settings=settings, secret=b"", weights_version=1, epoch=None))
    yield built.engine
    built.close()


def answers(engine: Engine, tokenizer: Tokenizer, conversations: list[list[str]]) -> list[str]:
    """To the last of each conversation's texts, which user and assistant wrote by turns."""
    params = SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)
    for index, texts in enumerate(conversations):
        turns = zip(["user", "assistant"] * len(texts), texts, strict=False)
        prompt_ids = encode_chat(tokenizer, [ChatMessage.of_text(role, text) for role, text in turns])
        engine.add(GenerateRequest(request_id=str(index), prompt_ids=prompt_ids, params=params))
    token_ids: dict[str, list[int]] = {str(index): [] for index in range(len(conversations))}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            token_ids[output.request_id] += output.token_ids
    return [tokenizer.decode(each) for each in token_ids.values()]


def assert_right(given: list[str], samples: list[Sample], num_right: int = NUM_RIGHT) -> None:
    wrong = [pair for pair in zip(samples, given, strict=True) if pair[0].answer != pair[1]]
    assert len(samples) - len(wrong) >= num_right, wrong


@pytest.mark.parametrize("task", TASKS)
def test_held_out_prompts_are_answered_right(engine: Engine, tokenizer: Tokenizer, task: str) -> None:
    samples = held_out_samples(task, NUM_PROMPTS, seed=11)
    assert_right(answers(engine, tokenizer, [[sample.prompt] for sample in samples]), samples)


def test_later_questions_of_a_conversation_are_mostly_answered_right(engine: Engine, tokenizer: Tokenizer) -> None:
    """Each of the samples after two of other tasks."""
    by_task = [held_out_samples(task, NUM_PROMPTS, seed=12) for task in TASKS]
    rounds = [[samples[index] for samples in by_task] for index in range(NUM_PROMPTS)]
    asked = [(each[turn % 4], each[(turn + 1) % 4], each[(turn + 2) % 4]) for turn, each in enumerate(rounds)]
    conversations = [
        [first.prompt, first.answer, second.prompt, second.answer, last.prompt] for first, second, last in asked
    ]
    assert_right(answers(engine, tokenizer, conversations), [last for _, _, last in asked], NUM_RIGHT_LATER)


def test_logits_are_transformers(tokenizer: Tokenizer) -> None:
    oracle = Llama4ForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.float32, attn_implementation="eager")
    demo = TinyModel(oracle=oracle.eval(), config=read_model_config(demo_checkpoint()), folder=demo_checkpoint())
    for task in TASKS:
        [sample] = held_out_samples(task, 1, seed=0)
        token_ids = encode_chat(tokenizer, [ChatMessage.of_text("user", sample.prompt)])
        logits = make_runner(demo).run(token_ids, [7, 16, len(token_ids) - 23])
        assert (logits - demo.oracle_logits(token_ids)).abs().max().item() <= TOLERANCE


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in demo_checkpoint().iterdir()) <= MAX_BYTES


def test_its_own_chat_template_gives_the_tokens_of_ours(tokenizer: Tokenizer) -> None:
    texts = [("system", "Be brief."), ("user", "add: 1+2"), ("assistant", "3"), ("user", "reverse: llama")]
    theirs = AutoTokenizer.from_pretrained(demo_checkpoint()).apply_chat_template(
        [{"role": role, "content": text} for role, text in texts], add_generation_prompt=True, return_dict=False
    )
    assert theirs == encode_chat(tokenizer, [ChatMessage.of_text(role, text) for role, text in texts])
