"""The model against transformers, and the plain reference against both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_choice import KERNELS, kernels
from paged_runner import RunningSequence, make_runner
from reference_model import ReferenceModel
from tiny_models import LONG, SCOUT, TINY_CONFIGS, TOLERANCE, UNEVEN, TinyModel, make_tiny, prompt

PROMPT_LENGTHS = (53, 71, 90)
EXTREMES = {
    "one_layer": SCOUT | {"num_hidden_layers": 1},
    "one_expert": SCOUT | {"num_hidden_layers": 3, "num_local_experts": 1},
    "no_moe_layers": SCOUT | {"num_hidden_layers": 3, "moe_layers": []},
    "only_global_layers": SCOUT | {"num_hidden_layers": 3, "no_rope_layers": [0, 0, 0]},
    "only_local_layers": SCOUT | {"num_hidden_layers": 3, "no_rope_layers": [1, 1, 1]},
    "every_expert": SCOUT | {"num_hidden_layers": 3, "num_experts_per_tok": 4},
    "tied_embeddings": SCOUT | {"num_hidden_layers": 3, "tie_word_embeddings": True},
    "chunks_of_one": SCOUT | {"num_hidden_layers": 3, "attention_chunk_size": 1},
    "one_pair_per_head": SCOUT | {"num_hidden_layers": 3, "head_dim": 2},
    "uneven": UNEVEN,
}


@pytest.fixture(autouse=True, params=KERNELS)
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    with kernels(request.param):
        yield


@pytest.fixture(scope="module", params=TINY_CONFIGS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny(TINY_CONFIGS[request.param], tmp_path_factory.mktemp(request.param))


def assert_close(logits: torch.Tensor, oracle: torch.Tensor) -> None:
    assert logits.dtype == torch.float32
    assert logits.shape == oracle.shape
    assert (logits - oracle).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_plain_reference_agrees_with_transformers(tiny: TinyModel, length: int) -> None:
    token_ids = prompt(length, seed=length)
    reference = ReferenceModel(tiny.oracle.config.to_dict(), tiny.state)
    assert_close(reference.logits(token_ids), tiny.oracle_logits(token_ids))


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_whole_prefill_agrees_with_transformers(tiny: TinyModel, length: int) -> None:
    token_ids = prompt(length, seed=length)
    assert_close(make_runner(tiny).run(token_ids), tiny.oracle_logits(token_ids))


@pytest.mark.parametrize("config", EXTREMES.values(), ids=EXTREMES)
def test_the_extremes_of_every_size_agree_with_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    extreme = make_tiny(config, tmp_path)
    token_ids = prompt(60, seed=1)
    assert_close(make_runner(extreme).run(token_ids, [7, 16, 1, 36]), extreme.oracle_logits(token_ids))
    bfloat16 = make_runner(extreme, dtype=torch.bfloat16).run(token_ids, [7, 16, 1, 36])
    assert (bfloat16 - extreme.oracle_logits(token_ids)).abs().mean().item() < 0.2


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_uneven_chunked_prefill_agrees_with_transformers(tiny: TinyModel, length: int) -> None:
    token_ids = prompt(length, seed=length)
    counts = [7, 16, 1, 25, length - 49]
    assert_close(make_runner(tiny).run(token_ids, counts), tiny.oracle_logits(token_ids))


def test_token_by_token_agrees_with_transformers(tiny: TinyModel) -> None:
    token_ids = prompt(90, seed=1)
    assert_close(make_runner(tiny).run(token_ids, [1] * 90), tiny.oracle_logits(token_ids))


def test_sequences_in_one_batch_each_agree_with_transformers(tiny: TinyModel) -> None:
    runner = make_runner(tiny)
    prompts = [prompt(length, seed=length) for length in (53, 60, 77, 90)]
    sequences = [RunningSequence(token_ids) for token_ids in prompts]
    runner.step([(sequences[0], 53), (sequences[1], 20), (sequences[2], 1)])
    runner.step([(sequences[3], 70), (sequences[1], 40), (sequences[2], 76)])
    runner.step([(sequences[3], 20)])
    for sequence, token_ids in zip(sequences, prompts, strict=True):
        assert_close(torch.cat(sequence.logits), tiny.oracle_logits(token_ids))


def test_kv_longer_than_a_split_agrees_with_transformers(tmp_path_factory: pytest.TempPathFactory) -> None:
    long = make_tiny(LONG, tmp_path_factory.mktemp("long"))
    token_ids = prompt(900, seed=3)
    logits = make_runner(long).run(token_ids, [300, 1, 330, 1, 268])
    assert_close(logits, long.oracle_logits(token_ids))
