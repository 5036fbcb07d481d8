"""The text model of Llama 4 for training: plain float32 autograd over the published tensors, whole rows, no cache.

Only what the demo needs: every layer has experts, one of them per token. Shapes: B rows, T positions, N = B x T
tokens, D model width, F hidden width, E experts, H heads, K key heads, A head width, C attention chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, sigmoid, silu

from cluster.checkpoints.random_weights import Role, Weight, plan_weights


def initial_state(config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """Every tensor under its published name, scaled by its fan-in; the residual writes are kept small together.

    All embeddings have a direction in common. Llama 4 has no biases, and its local layers normalise queries and keys:
    without such a direction no head can look at "the token before" whatever that token is.
    """
    generator = torch.Generator().manual_seed(seed)
    num_writes = 2 * config["num_hidden_layers"]

    def std(weight: Weight) -> float:
        if weight.role is Role.EMBEDDING:
            return 0.5
        return 1 / math.sqrt(weight.fan_in * (num_writes if weight.role is Role.WRITE else 1))

    state = {}
    for weight in plan_weights(config):
        shape = weight.spec.shape
        drawn = torch.ones(shape) if weight.role is Role.NORM else torch.randn(shape, generator=generator) * std(weight)
        if weight.role is Role.EMBEDDING:
            drawn += torch.randn(shape[-1], generator=generator) * std(weight)
        state[weight.spec.name] = drawn.requires_grad_()
    return state


@dataclass(slots=True)
class Balance:
    """Collects the Switch Transformer's load balancing term over the layers: 1 when experts share the work evenly."""

    total: Tensor
    num_layers: int = 0

    def add(self, logits_NE: Tensor, counts_E: Tensor) -> None:
        share_E = counts_E / counts_E.sum()
        self.total = self.total + len(counts_E) * (share_E * logits_NE.softmax(-1).mean(0)).sum()
        self.num_layers += 1

    @property
    def mean(self) -> Tensor:
        return self.total / self.num_layers


class TrainingModel:
    """``state`` may be changed from outside between calls: by an optimizer, or replaced by rounded values."""

    def __init__(self, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        self.config = config
        self.state = state

    def logits(self, ids_BT: Tensor, targets_N: Tensor, balance: Balance | None = None) -> Tensor:
        """[len(targets_N), vocabulary] at the given indices into the flattened rows. T must be whole chunks."""
        x_BTD = self.state["model.embed_tokens.weight"][ids_BT]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            x_BTD = x_BTD + self._attention(layer, self._norm(x_BTD, prefix + "input_layernorm.weight"))
            normed_BTD = self._norm(x_BTD, prefix + "post_attention_layernorm.weight")
            x_BTD = x_BTD + self._moe(prefix + "feed_forward.", normed_BTD.flatten(0, 1), balance).view_as(x_BTD)
        picked_ND = x_BTD.flatten(0, 1)[targets_N]
        return self._norm(picked_ND, "model.norm.weight") @ self.state["lm_head.weight"].T

    def _norm(self, x: Tensor, weight: str) -> Tensor:
        return torch.rms_norm(x, x.shape[-1:], self.state[weight], self.config["rms_norm_eps"])

    def _attention(self, layer: int, x_BTD: Tensor) -> Tensor:
        config, prefix = self.config, f"model.layers.{layer}.self_attn."
        num_rows, length, _ = x_BTD.shape
        span = config["attention_chunk_size"] if config["no_rope_layers"][layer] else length
        # A local layer sees nothing outside its chunk: chunks are rows of their own.
        q, k, v = (
            (x_BTD @ self.state[f"{prefix}{kind}_proj.weight"].T).view(-1, span, heads, config["head_dim"])
            for kind, heads in (
                ("q", config["num_attention_heads"]),
                ("k", config["num_key_value_heads"]),
                ("v", config["num_key_value_heads"]),
            )
        )
        if config["no_rope_layers"][layer]:
            q, k = self._unit(self._rotate(q)), self._unit(self._rotate(k))
        else:
            q = q * self._temperature(length)
        group = config["num_attention_heads"] // config["num_key_value_heads"]
        q, k, v = (part.transpose(1, 2) for part in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
        out = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return out.reshape(num_rows, length, -1) @ self.state[prefix + "o_proj.weight"].T

    def _unit(self, x: Tensor) -> Tensor:
        return torch.rms_norm(x, x.shape[-1:], eps=self.config["rms_norm_eps"])

    def _rotate(self, x_BCHA: Tensor) -> Tensor:
        """By the position in the chunk: scores depend on differences of positions only, all within one chunk."""
        span, head_dim = x_BCHA.shape[1], x_BCHA.shape[3]
        frequencies = self.config["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.arange(span)[:, None] * frequencies
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        even, odd = x_BCHA[..., 0::2], x_BCHA[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    def _temperature(self, length: int) -> Tensor:
        steps = torch.floor((torch.arange(length) + 1) / self.config["floor_scale"])
        return (torch.log(steps + 1) * self.config["attn_scale"] + 1)[:, None, None]

    def _moe(self, prefix: str, x_ND: Tensor, balance: Balance | None) -> Tensor:
        logits_NE = x_ND @ self.state[prefix + "router.weight"].T
        top = logits_NE.max(-1)
        order_N = top.indices.argsort(stable=True)
        counts_E = torch.bincount(top.indices, minlength=logits_NE.shape[-1])
        if balance is not None:
            balance.add(logits_NE, counts_E)
        sorted_ND = _Permuted.apply(x_ND * sigmoid(top.values)[:, None], order_N)
        outputs = [
            _gated(rows_RD @ gate_up_DF) @ down_FD
            for rows_RD, gate_up_DF, down_FD in zip(
                sorted_ND.split(counts_E.tolist()),
                self.state[prefix + "experts.gate_up_proj"].unbind(),
                self.state[prefix + "experts.down_proj"].unbind(),
                strict=True,
            )
        ]
        return self._shared(prefix + "shared_expert.", x_ND) + _Permuted.apply(torch.cat(outputs), order_N.argsort())

    def _shared(self, prefix: str, x_ND: Tensor) -> Tensor:
        gate, up, down = (self.state[f"{prefix}{name}_proj.weight"].T for name in ("gate", "up", "down"))
        return (silu(x_ND @ gate) * (x_ND @ up)) @ down


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


class _Permuted(torch.autograd.Function):
    """x[order] of a permutation. Its gradient is the inverse permutation, not the scatter-add that indexing needs."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_N: Tensor) -> Tensor:
        ctx.save_for_backward(order_N)
        return x_ND[order_N]

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, None]:
        (order_N,) = ctx.saved_tensors
        return gradient_ND[order_N.argsort()], None
