"""The demo model's accuracy as a user has it: every held-out prompt a chat over gRPC, many at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import RunApp, Service, Tell

from cluster.checkpoints.demo_model import demo_checkpoint
from cluster.checkpoints.demo_tasks import TASKS, Sample, held_out_samples
from cluster.client import ArrieroClient
from cluster.client_types import Sampling
from cluster.front.chat import ChatMessage

pytestmark = pytest.mark.cluster

NUM_PROMPTS = 200
NUM_STREAMS = 32
LEAST_ACCURACY = 0.95
TIMEOUT_S = 120.0
GREEDY = Sampling(temperature=0.0, max_tokens=16)


@pytest.fixture(scope="module")
def demo(run_app: RunApp) -> Iterator[Service]:
    """In the dtype that the checkpoint asks for."""
    model = str(demo_checkpoint())
    with run_app("demo", model=model, dtype="auto", routers=1, shards=4, num_kv_blocks=4096) as running:
        yield running


@pytest.mark.parametrize("task", TASKS)
def test_the_demo_model_answers_held_out_prompts(demo: Service, task: str, tell: Tell) -> None:
    samples = held_out_samples(task, NUM_PROMPTS, seed=2026)
    with demo.client() as client, ThreadPoolExecutor(NUM_STREAMS) as threads:
        given = list(threads.map(lambda sample: answer(client, sample), samples))
    wrong = [(sample.prompt, text) for sample, text in zip(samples, given, strict=True) if text != sample.answer]
    accuracy = 1 - len(wrong) / NUM_PROMPTS
    tell(f"{accuracy:.1%} of {NUM_PROMPTS} right" + "".join(f"\n  wrong: {each}" for each in wrong))
    assert accuracy >= LEAST_ACCURACY


def answer(client: ArrieroClient, sample: Sample) -> str:
    messages = [ChatMessage.of_text("user", sample.prompt)]
    return "".join(piece.text for piece in client.generate(messages, sampling=GREEDY, timeout_s=TIMEOUT_S))
