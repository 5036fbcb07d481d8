"""What the model offers besides logits of tokens: embeddings in, missing experts out, bfloat16, few logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from paged_runner import PagedRunner, RunningSequence, make_runner
from tiny_models import SCOUT, TinyModel, build_oracle, make_tiny, prompt

from experts.dispatch import Combined, Dispatcher, Handle
from experts.mlp import Mlp
from router.attention import temperature
from router.batch import InputEmbeddings, SequenceSlice, build_batch
from router.config import ModelConfig
from router.moe import MoeLayer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny(SCOUT, tmp_path_factory.mktemp("scout"))


class LosingDispatcher:
    """Reports tokens as missing in some layers, as a dispatcher does that has lost a shard."""

    def __init__(self, inner: Dispatcher, missing_by_layer: dict[int, list[bool]]) -> None:
        self.inner = inner
        self.missing_by_layer = missing_by_layer
        # Of the dispatch that the next combine belongs to.
        self.layer: int | None = None

    def dispatch(self, layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, scores_TK: torch.Tensor) -> Handle:
        self.layer = layer
        return self.inner.dispatch(layer, x_TD, ids_TK, scores_TK)

    def combine(self, handle: Handle) -> Combined:
        assert self.layer is not None
        missing = self.missing_by_layer.get(self.layer)
        y_TD = self.inner.combine(handle).y_TD
        return Combined(y_TD, None if missing is None else torch.tensor(missing))


def test_given_embeddings_replace_those_of_the_tokens(tiny: TinyModel) -> None:
    token_ids = prompt(30, seed=1)
    want = make_runner(tiny).run(token_ids)
    rows = torch.tensor([3, 17, 29])
    values = tiny.load().weights.embedding_VD[torch.tensor(token_ids)[rows]]
    masked = [5 if index in rows else token_id for index, token_id in enumerate(token_ids)]
    runner = make_runner(tiny)
    sequence = RunningSequence(masked)
    runner.step([(sequence, 30)], embeddings=InputEmbeddings(rows, values))
    assert torch.equal(sequence.logits[0], want)


def test_tokens_that_missed_an_expert_in_any_layer_are_told(tiny: TinyModel) -> None:
    runner = make_runner(tiny)
    lost = {1: [False, True, False, False], 6: [False, False, False, True]}
    runner.dispatcher = LosingDispatcher(runner.dispatcher, lost)  # type: ignore[assignment]
    result = runner.step([(RunningSequence(prompt(4, seed=1)), 4)])
    assert result.missing_T is not None
    assert result.missing_T.tolist() == [False, True, False, True]


def test_nothing_is_reported_missing_when_nothing_is(tiny: TinyModel) -> None:
    assert make_runner(tiny).step([(RunningSequence(prompt(4, seed=1)), 4)]).missing_T is None


def test_shared_expert_runs_while_the_rows_travel(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    run_mlp = Mlp.__call__
    runner = make_runner(tiny)
    inner = runner.dispatcher

    class Recording(LosingDispatcher):
        def dispatch(self, *arguments: object) -> Handle:  # type: ignore[override]
            handle = inner.dispatch(*arguments)  # type: ignore[arg-type]
            events[:] = ["dispatch"]
            return handle

        def combine(self, handle: Handle) -> Combined:
            events.append("combine")
            return inner.combine(handle)

    def recorded(mlp: Mlp, x_RD: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        events.append("shared expert")
        return run_mlp(mlp, x_RD, **options)

    monkeypatch.setattr(Mlp, "__call__", recorded)
    runner.dispatcher = Recording(inner, {})  # type: ignore[assignment]
    runner.step([(RunningSequence(prompt(4, seed=1)), 4)])
    assert events == ["dispatch", "shared expert", "combine"]


def step_wanting(runner: PagedRunner, logits_from: int) -> torch.Tensor:
    part = SequenceSlice(
        token_ids=prompt(8, seed=1), start=0, global_blocks=[1], local_blocks=[1], logits_from=logits_from
    )
    batch = build_batch([part], runner.model.config, 16, torch.device("cpu"))
    return runner.model.forward(batch, runner.kv, runner.dispatcher).logits_LV


def test_logits_are_computed_only_where_wanted(tiny: TinyModel) -> None:
    every = step_wanting(make_runner(tiny), 0)
    assert torch.equal(step_wanting(make_runner(tiny), 7), every[7:])
    assert step_wanting(make_runner(tiny), 8).shape == (0, SCOUT["vocab_size"])


def test_bfloat16_is_as_close_to_float32_as_transformers_is(tmp_path: Path) -> None:
    config = SCOUT | {"initializer_range": 0.05, "moe_layers": []}
    tiny = make_tiny(config, tmp_path)
    token_ids = prompt(80, seed=2)
    exact = tiny.oracle_logits(token_ids)
    with torch.no_grad():
        theirs = build_oracle(config).bfloat16()(torch.tensor([token_ids])).logits[0].float()
    ours = make_runner(tiny, dtype=torch.bfloat16).run(token_ids)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().mean() <= 1.1 * (theirs - exact).abs().mean()


def test_bfloat16_routes_through_experts(tiny: TinyModel) -> None:
    logits = make_runner(tiny, dtype=torch.bfloat16).run(prompt(40, seed=2), [20, 1, 19])
    assert logits.isfinite().all()


def test_temperature_rises_as_published() -> None:
    config = ModelConfig.from_checkpoint_config({"model_type": "llama4_text"})
    positions = torch.tensor([0, 8190, 8191, 16383, 131071, 1048575, 10485759])
    want = torch.tensor([1.0, 1.0, 1.0693, 1.1099, 1.2833, 1.4860, 1.7156])
    torch.testing.assert_close(temperature(positions, config), want, rtol=0, atol=1e-4)


def test_a_model_without_experts_needs_no_dispatcher(tmp_path: Path) -> None:
    tiny = make_tiny(SCOUT | {"moe_layers": [], "num_hidden_layers": 4}, tmp_path)
    token_ids = prompt(20, seed=4)
    runner = make_runner(tiny)
    runner.dispatcher = None  # type: ignore[assignment]
    assert (runner.run(token_ids) - tiny.oracle_logits(token_ids)).abs().max() < 5e-5
    assert not any(isinstance(layer._feed_forward, MoeLayer) for layer in runner.model._layers)
