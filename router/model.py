"""The Llama 4 text model over a step's batch: embeddings, decoder layers, logits (llama4.md §2).

Shapes: T tokens of the step, D model, L rows that want logits, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch

from experts.dispatch import Dispatcher
from experts.mlp import Mlp
from router.attention import AttentionLayer, PositionFactors, temperature
from router.batch import Batch, StepPlan
from router.config import ModelConfig
from router.gating import Gate
from router.kv_cache import KvCache, LayerKv
from router.micro_batches import take_turns
from router.moe import MoeLayer, RowsAway, receive
from router.norm import rms_norm
from router.rope import inverse_frequencies, rotation
from router.weights import LayerWeights, ModelWeights


class ForwardResult(NamedTuple):
    logits_LV: torch.Tensor
    """float32."""
    missing_T: torch.Tensor | None
    """bool: tokens that went without one of their routed experts in some layer; None when there are none."""
    waited_s: float = 0.0
    """Of the time it took: with nothing to do but to wait for experts."""


class _Passed(NamedTuple):
    """A batch behind its last layer."""

    x_LD: torch.Tensor
    missing_T: torch.Tensor | None
    waited_s: float


class Llama4Model:
    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self.weights = weights
        self.device = weights.embedding_VD.device
        self._inverse_frequencies_J = inverse_frequencies(config.rope, config.head_dim, self.device)
        self._layers = tuple(_DecoderLayer(config, index, layer) for index, layer in enumerate(weights.layers))

    def forward(self, batch: Batch, kv: KvCache, dispatcher: Dispatcher) -> ForwardResult:
        """Computes every token of the batch, storing its keys and values. begin_step is the caller's."""
        return self.forward_in_turn([batch], kv, dispatcher)

    def forward_in_turn(self, batches: Sequence[Batch], kv: KvCache, dispatcher: Dispatcher) -> ForwardResult:
        """One step in several batches: while the rows of one are with the experts another one computes.

        A batch may go on with sequences of the ones before it, for it comes to each layer after them. The result is
        of all tokens, in the order of the batches, and its bits are those of one batch.
        """
        done = take_turns([self._pass(batch, kv, dispatcher) for batch in batches])
        x_LD = torch.cat([each.x_LD for each in done]) if len(done) > 1 else done[0].x_LD
        logits_LV = self.weights.lm_head_VD.wide(rms_norm(x_LD, self.weights.norm_D, self.config.rms_norm_eps))
        missing_T = _join([each.missing_T for each in done], [batch.num_tokens for batch in batches])
        return ForwardResult(logits_LV, missing_T, sum(each.waited_s for each in done))

    def _pass(self, batch: Batch, kv: KvCache, dispatcher: Dispatcher) -> Generator[None, None, _Passed]:
        """Yields in each MoE layer, when there is nothing left to do but to wait for the experts."""
        x_TD = self._embed(batch)
        factors = self._position_factors(batch)
        missing_T: torch.Tensor | None = None
        waited_s = 0.0
        for index, layer in enumerate(self._layers):
            plan = batch.local_plan if self.config.rope_layers[index] else batch.global_plan
            result = layer(x_TD, factors, kv.layer(index), plan, dispatcher)
            if isinstance(result, RowsAway):
                yield
                began_at = time.perf_counter()
                x_TD, layer_missing_T = receive(result, dispatcher)
                waited_s += time.perf_counter() - began_at
                missing_T = _either(missing_T, layer_missing_T)
            else:
                x_TD = result
        return _Passed(x_TD.index_select(0, batch.logit_rows_L), missing_T, waited_s)

    def _embed(self, batch: Batch) -> torch.Tensor:
        x_TD = self.weights.embedding_VD.index_select(0, batch.token_ids_T)
        if batch.embeddings is not None:
            x_TD[batch.embeddings.rows_M] = batch.embeddings.values_MD.to(x_TD.dtype)
        return x_TD

    def _position_factors(self, batch: Batch) -> PositionFactors:
        return PositionFactors(
            rotation(batch.rope_positions_T, self._inverse_frequencies_J),
            temperature(batch.positions_T, self.config)[:, None, None],
        )


class _DecoderLayer:
    def __init__(self, config: ModelConfig, index: int, weights: LayerWeights) -> None:
        self._eps = config.rms_norm_eps
        self._weights = weights
        self._attention = AttentionLayer(config, weights.attention, is_local=config.rope_layers[index])
        self._feed_forward: Mlp | MoeLayer
        if isinstance(weights.feed_forward, Mlp):
            self._feed_forward = weights.feed_forward
        else:
            moe = weights.feed_forward
            self._feed_forward = MoeLayer(index, Gate(moe.gate_ED, config.num_experts_per_tok), moe.shared_expert)

    def __call__(
        self,
        x_TD: torch.Tensor,
        factors: PositionFactors,
        kv: LayerKv,
        plan: StepPlan,
        dispatcher: Dispatcher,
    ) -> torch.Tensor | RowsAway:
        """The layer's output; of an MoE layer, what ``receive`` makes it of."""
        normed_TD = rms_norm(x_TD, self._weights.input_norm_D, self._eps)
        x_TD = self._attention(normed_TD, factors, kv, plan, residual_TD=x_TD)
        normed_TD = rms_norm(x_TD, self._weights.post_attention_norm_D, self._eps)
        if isinstance(self._feed_forward, Mlp):
            return self._feed_forward(normed_TD, added_RD=x_TD)
        return self._feed_forward.send(normed_TD, dispatcher, residual_TD=x_TD)


def _either(first_T: torch.Tensor | None, second_T: torch.Tensor | None) -> torch.Tensor | None:
    if first_T is None or second_T is None:
        return second_T if first_T is None else first_T
    return first_T | second_T


def _join(missing: Sequence[torch.Tensor | None], num_tokens: Sequence[int]) -> torch.Tensor | None:
    """Of all batches, one behind the other."""
    present = [each for each in missing if each is not None]
    if not present or len(missing) == 1:
        return missing[0]
    none_there = [present[0].new_zeros(count) for count in num_tokens]
    return torch.cat([none if each is None else each for each, none in zip(missing, none_there, strict=True)])
