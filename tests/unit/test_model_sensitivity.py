"""Each way to get Llama 4 wrong that llama4.md §8 lists must show: the parity tests' tolerance has to catch it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from kernel_choice import kernels
from paged_runner import PagedRunner, make_runner
from tiny_models import SCOUT, TOLERANCE, TinyModel, make_tiny, prompt

from experts.dispatch import Combined, Dispatcher, Handle
from experts.mlp import Mlp
from router import attention, attention_plan, batch, model
from router.attention import AttentionLayer, PositionFactors
from router.config import ModelConfig, RopeConfig
from router.gating import Gate, Gating
from router.kv_cache import KvGroup
from router.moe import MoeLayer, RowsAway
from router.norm import rms_normalize
from router.rope import Rotation

CLEARLY = 200 * TOLERANCE
Patch = pytest.MonkeyPatch
CHUNK = SCOUT["attention_chunk_size"]


@pytest.fixture(autouse=True)
def _plain_torch() -> Iterator[None]:
    """The mutations are made in Python; test_model_parity.py holds the compiled kernels to the same tolerance."""
    with kernels("torch"):
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny(SCOUT, tmp_path_factory.mktemp("scout"))


def with_config(change: Callable[[ModelConfig], dict[str, Any]]) -> Callable[[TinyModel, Patch], PagedRunner]:
    def mutate(tiny: TinyModel, patch: Patch) -> PagedRunner:
        config = dataclasses.replace(tiny.config, **change(tiny.config))
        return make_runner(dataclasses.replace(tiny, config=config))

    return mutate


def with_patch(apply: Callable[[Patch], None]) -> Callable[[TinyModel, Patch], PagedRunner]:
    def mutate(tiny: TinyModel, patch: Patch) -> PagedRunner:
        apply(patch)
        return make_runner(tiny)

    return mutate


def sliding_window(tiny: TinyModel, patch: Patch) -> PagedRunner:
    """Local layers see the last C positions. Planned without chunks, so that those positions are kept."""
    plan, causal = batch._plan, attention_plan.hidden_keys

    def windowed(rows_NR: np.ndarray, keys_P: np.ndarray) -> np.ndarray:
        return causal(rows_NR, keys_P) | (keys_P <= rows_NR[:, :, None] - CHUNK)

    def plan_windowed(slices: Any, group: KvGroup, *rest: Any) -> batch.StepPlan:
        with Patch.context() as inner:
            if group is KvGroup.LOCAL:
                inner.setattr(attention_plan, "hidden_keys", windowed)
            return plan(slices, group, *rest)

    patch.setattr(batch, "_plan", plan_windowed)
    return with_config(lambda _: {"attention_chunk_size": None})(tiny, patch)


class ScaledOutput:
    """Score on the experts' output instead of their input. Top-1 only."""

    def __init__(self, inner: Dispatcher) -> None:
        self.inner = inner

    def dispatch(self, layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, scores_TK: torch.Tensor) -> Handle:
        self.scores_T1 = scores_TK
        return self.inner.dispatch(layer, x_TD, ids_TK, torch.ones_like(scores_TK))

    def combine(self, handle: Handle) -> Combined:
        combined = self.inner.combine(handle)
        return Combined(combined.y_TD * self.scores_T1, combined.missing_T)


def score_on_output(tiny: TinyModel, patch: Patch) -> PagedRunner:
    runner = make_runner(tiny)
    runner.dispatcher = ScaledOutput(runner.dispatcher)  # type: ignore[assignment]
    return runner


def softmax_gate(patch: Patch) -> None:
    def gate(self: Gate, x_TD: torch.Tensor) -> Gating:
        values, ids = self._gate_ED(x_TD).softmax(-1).topk(self._top_k, dim=-1)
        return Gating(ids, values)

    patch.setattr(Gate, "__call__", gate)


def swapped_gate_and_up(tiny: TinyModel, patch: Patch) -> PagedRunner:
    runner = make_runner(tiny)
    slots = runner.dispatcher._shard._slots  # type: ignore[attr-defined]
    for slot, mlp in slots.items():
        slots[slot] = Mlp(gate=mlp.up, up=mlp.gate, down=mlp.down)
    return runner


def half_rotation(patch: Patch) -> None:
    def rotate(x_THD: torch.Tensor, by: Rotation) -> torch.Tensor:
        first, second = x_THD.chunk(2, dim=-1)
        cos, sin = by.cos_TJ[:, None], by.sin_TJ[:, None]
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)

    patch.setattr(attention, "rotate", rotate)


def qk_norm_on_global_layers(patch: Patch) -> None:
    position = AttentionLayer._position

    def normed(self: AttentionLayer, q: torch.Tensor, k: torch.Tensor, factors: PositionFactors) -> Any:
        if not self._is_local:
            q, k = rms_normalize(q, 1e-5), rms_normalize(k, 1e-5)
        return position(self, q, k, factors)

    patch.setattr(AttentionLayer, "_position", normed)


def temperature_off_by_one(patch: Patch) -> None:
    right = attention.temperature
    patch.setattr(model, "temperature", lambda positions_T, config: right(positions_T - 1, config))


def temperature_on_local_layers(patch: Patch) -> None:
    position = AttentionLayer._position

    def heated(self: AttentionLayer, q: torch.Tensor, k: torch.Tensor, factors: PositionFactors) -> Any:
        q, k = position(self, q, k, factors)
        return (q * factors.temperature_T11 if self._is_local else q), k

    patch.setattr(AttentionLayer, "_position", heated)


def no_shared_expert(patch: Patch) -> None:
    def routed_only(
        self: MoeLayer, x_TD: torch.Tensor, dispatcher: Dispatcher, *, residual_TD: torch.Tensor
    ) -> RowsAway:
        return RowsAway(dispatcher.dispatch(self._layer, x_TD, *self._gate(x_TD)), residual_TD)

    patch.setattr(MoeLayer, "send", routed_only)


def scaled_shared_expert_input(patch: Patch) -> None:
    right = MoeLayer.send

    def scaled(self: MoeLayer, x_TD: torch.Tensor, dispatcher: Dispatcher, *, residual_TD: torch.Tensor) -> RowsAway:
        scores_T1 = self._gate(x_TD).topk_scores_TK
        with Patch.context() as inner:
            shared: Mlp = self._shared_expert
            inner.setattr(self, "_shared_expert", lambda x, **rest: shared(x * scores_T1, **rest))
            return right(self, x_TD, dispatcher, residual_TD=residual_TD)

    patch.setattr(MoeLayer, "send", scaled)


MUTATIONS: dict[str, Callable[[TinyModel, Patch], PagedRunner]] = {
    "sliding window instead of chunks": sliding_window,
    "no chunking": with_config(lambda _: {"attention_chunk_size": None}),
    "score on the output": score_on_output,
    "softmax gate": with_patch(softmax_gate),
    "gate and up swapped": swapped_gate_and_up,
    "half rotation": with_patch(half_rotation),
    "no qk_norm": with_config(lambda _: {"use_qk_norm": False}),
    "qk_norm on NoPE layers": with_patch(qk_norm_on_global_layers),
    "no temperature": with_config(lambda _: {"attn_temperature_tuning": False}),
    "temperature off by one": with_patch(temperature_off_by_one),
    "temperature on rope layers": with_patch(temperature_on_local_layers),
    "no rope scaling": with_config(lambda c: {"rope": RopeConfig(theta=c.rope.theta, scaling=None)}),
    "rope everywhere": with_config(lambda c: {"rope_layers": (True,) * c.num_hidden_layers}),
    "no shared expert": with_patch(no_shared_expert),
    "shared expert on scaled input": with_patch(scaled_shared_expert_input),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_parity_notices(mutation: str, tiny: TinyModel, monkeypatch: Patch) -> None:
    token_ids = prompt(77, seed=11)
    oracle = tiny.oracle_logits(token_ids)
    runner = MUTATIONS[mutation](tiny, monkeypatch)
    difference = (runner.run(token_ids, [40, 1, 36]) - oracle).abs().max().item()
    assert difference > CLEARLY
