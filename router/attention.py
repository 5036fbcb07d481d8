"""One attention layer: projections, position handling of its kind, paged attention (llama4.md §2, steps 3 to 6).

A local layer rotates queries and keys, then normalises them per head (if the model does). A global layer has
neither; it raises its queries' temperature with their position.

Shapes: T tokens, D model, H query heads, K KV heads, A head_dim, J = A / 2 pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from experts.linear import PackedLinear
from router.attention_plan import AttentionPlan
from router.config import ModelConfig
from router.kv_cache import LayerKv
from router.native.kernels import PositionChanges
from router.norm import rms_normalize
from router.paged_attention import attend
from router.rope import Rotation, rotate
from router.tile_plan import TilePlan


class PositionFactors(NamedTuple):
    """What the tokens' positions do to queries and keys, computed once per step."""

    rotation: Rotation
    temperature_T11: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """``qkv`` has the rows of q, then k, then v: (H + 2 * K) * A of them. ``output`` is [D, H * A]."""

    qkv: PackedLinear
    output: PackedLinear


class AttentionLayer:
    def __init__(self, config: ModelConfig, weights: AttentionWeights, *, is_local: bool) -> None:
        self._config = config
        self._weights = weights
        self._is_local = is_local

    def __call__(
        self,
        x_TD: torch.Tensor,
        factors: PositionFactors,
        kv: LayerKv,
        plan: AttentionPlan | TilePlan,
        *,
        residual_TD: torch.Tensor,
    ) -> torch.Tensor:
        """Stores the tokens' keys and values in ``kv``, then attends. Returns residual + output, in x's dtype."""
        if isinstance(plan, TilePlan):
            out_TP = plan.attend(self._weights.qkv(x_TD), kv, self._changes(factors))
        else:
            out_TP = self._attend(x_TD, factors, kv, plan)
        return self._weights.output(out_TP, added_RO=residual_TD)

    def _changes(self, factors: PositionFactors) -> PositionChanges:
        """What _position does, for the compiled kernels."""
        if self._is_local:
            eps = self._config.rms_norm_eps if self._config.use_qk_norm else None
            return PositionChanges(rotation=factors.rotation, norm_eps=eps)
        return PositionChanges(temperature_T=factors.temperature_T11 if self._config.attn_temperature_tuning else None)

    def _attend(self, x_TD: torch.Tensor, factors: PositionFactors, kv: LayerKv, plan: AttentionPlan) -> torch.Tensor:
        q_THA, k_TKA, v_TKA = self._project(x_TD)
        q_THA, k_TKA = self._position(q_THA, k_TKA, factors)
        kv.write(plan.kv_rows, k_TKA, v_TKA)
        out_THA = attend(q_THA, kv, plan).out_THD
        return out_THA.flatten(1).to(x_TD.dtype)

    def _project(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first_k = self._config.num_attention_heads
        first_v = first_k + self._config.num_key_value_heads
        heads_THA = self._weights.qkv(x_TD).view(len(x_TD), -1, self._config.head_dim)
        return heads_THA[:, :first_k], heads_THA[:, first_k:first_v], heads_THA[:, first_v:]

    def _position(
        self, q_THA: torch.Tensor, k_TKA: torch.Tensor, factors: PositionFactors
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._is_local:
            return self._rotated(q_THA, factors.rotation), self._rotated(k_TKA, factors.rotation)
        if self._config.attn_temperature_tuning:
            q_THA = (q_THA * factors.temperature_T11).to(q_THA.dtype)
        return q_THA, k_TKA

    def _rotated(self, x_THA: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        rotated_THA = rotate(x_THA, rotation)
        return rms_normalize(rotated_THA, self._config.rms_norm_eps) if self._config.use_qk_norm else rotated_THA


def temperature(positions_T: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """float32 [T]: the factor of a global layer's queries at absolute ``positions_T``; 1 below floor_scale - 1."""
    steps_T = torch.floor((positions_T.double() + 1.0) / config.floor_scale)
    return (torch.log1p(steps_T) * config.attn_scale + 1.0).float()
