"""What the demo model is asked: answers, splits, and lists that are longer than its attention chunk."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import pytest

from cluster.checkpoints.demo_model import demo_checkpoint
from cluster.checkpoints.demo_tasks import TASKS, held_out_samples, is_held_out
from cluster.front.chat import ChatMessage, encode_chat
from cluster.front.tokenizer import Tokenizer
from cluster.service_model import read_model_config

DRAW = """
from cluster.checkpoints.demo_tasks import TASKS, held_out_samples
print([held_out_samples(task, 5, 3) for task in TASKS])
"""


def solve(prompt: str) -> str:
    """Written independently of the generators, from the prompt alone."""
    task, text = prompt.split(": ", 1)
    match task:
        case "sort":
            return "".join(letter for letter in map(chr, range(256)) for _ in range(text.count(letter)))
        case "reverse":
            return "".join(reversed(text))
        case "add":
            return str(sum(map(int, text.split("+"))))
        case _:
            return re.findall(rf"\b{text[-1]}\d", text)[0]


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_right(task: str) -> None:
    samples = held_out_samples(task, 200, seed=1)
    assert [(sample.task, solve(sample.prompt)) for sample in samples] == [(task, each.answer) for each in samples]


@pytest.mark.parametrize("task", TASKS)
def test_held_out_samples_differ_from_each_other_and_are_held_out(task: str) -> None:
    prompts = [sample.prompt for sample in held_out_samples(task, 200, seed=0)]
    assert len(set(prompts)) == 200
    assert all(is_held_out(prompt) for prompt in prompts)


@pytest.mark.parametrize("task", TASKS)
def test_most_prompts_are_left_for_training(task: str) -> None:
    rng = random.Random(7)
    held_out = sum(is_held_out(TASKS[task](rng).prompt) for _ in range(4000))
    assert 350 < held_out < 650


def test_a_seed_gives_the_same_samples_in_another_process() -> None:
    texts = [subprocess.run([sys.executable, "-c", DRAW], check=True, capture_output=True, timeout=60) for _ in "ab"]
    assert texts[0].stdout == texts[1].stdout
    assert texts[0].stdout.decode().strip() == str([held_out_samples(task, 5, 3) for task in TASKS])


def test_another_seed_gives_other_samples() -> None:
    for task in TASKS:
        assert held_out_samples(task, 20, 3) != held_out_samples(task, 20, 4)


def test_recall_reaches_over_attention_chunks() -> None:
    chunk = read_model_config(demo_checkpoint()).attention_chunk_size
    assert chunk is not None
    tokenizer = Tokenizer(demo_checkpoint())
    num_crossing = 0
    for sample in held_out_samples("recall", 200, seed=0):
        token_ids = encode_chat(tokenizer, [ChatMessage.of_text("user", sample.prompt)])
        start, list_text = bytes(token_ids[9:12]), sample.prompt.removeprefix("recall: ").split(" ?")[0]
        assert start == b"rec"
        assert len(list_text) > chunk
        assert len(token_ids) > 2 * chunk
        key, question = (9 + sample.prompt.index(sample.answer), 9 + len(sample.prompt) - 1)
        num_crossing += key // chunk < question // chunk
    assert num_crossing > 150
