"""The model of llama4.md §2 written out plainly, as the oracle of router.model: whole sequences, no cache, no packing.

Reads nothing but a state dict and a transformers-5 style text config (a dict). Slow on purpose.
Shapes: T tokens, D model, H query heads, A head_dim, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import sigmoid, silu


class ReferenceModel:
    def __init__(self, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        self.config = config
        self.state = state

    def logits(self, token_ids: list[int]) -> Tensor:
        """[T, V] of one sequence from position 0."""
        x_TD = self.state["model.embed_tokens.weight"][torch.tensor(token_ids)]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            x_TD = x_TD + self.attention(layer, self.norm(x_TD, prefix + "input_layernorm.weight"))
            normed_TD = self.norm(x_TD, prefix + "post_attention_layernorm.weight")
            if layer in self.config["moe_layers"]:
                x_TD = x_TD + self.moe(prefix + "feed_forward.", normed_TD)
            else:
                x_TD = x_TD + self.mlp(prefix + "feed_forward.", normed_TD)
        return self.norm(x_TD, "model.norm.weight") @ self.state["lm_head.weight"].T

    def norm(self, x: Tensor, weight: str) -> Tensor:
        return self.normalize(x) * self.state[weight]

    def normalize(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])

    def attention(self, layer: int, x_TD: Tensor) -> Tensor:
        config, prefix, num_tokens = self.config, f"model.layers.{layer}.self_attn.", len(x_TD)
        uses_rope = config["no_rope_layers"][layer] == 1
        q, k, v = (
            (x_TD @ self.state[f"{prefix}{kind}_proj.weight"].T).view(num_tokens, -1, config["head_dim"])
            for kind in "qkv"
        )
        if uses_rope:
            q, k = self.rotate(q), self.rotate(k)
            if config["use_qk_norm"]:
                q, k = self.normalize(q), self.normalize(k)
        elif config["attn_temperature_tuning"]:
            steps = [math.floor((p + 1) / config["floor_scale"]) for p in range(num_tokens)]
            q = q * torch.tensor([math.log(s + 1) * config["attn_scale"] + 1 for s in steps]).view(-1, 1, 1)
        group = config["num_attention_heads"] // config["num_key_value_heads"]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores_HTT = torch.einsum("qha,kha->hqk", q, k) * config["head_dim"] ** -0.5
        scores_HTT[:, ~self.visible(num_tokens, is_local=uses_rope)] = float("-inf")
        out = torch.einsum("hqk,kha->qha", scores_HTT.softmax(-1), v)
        return out.reshape(num_tokens, -1) @ self.state[prefix + "o_proj.weight"].T

    def visible(self, num_tokens: int, *, is_local: bool) -> Tensor:
        position = torch.arange(num_tokens)
        query, key = position[:, None], position[None, :]
        chunk = self.config["attention_chunk_size"]
        return (key <= query) & (query // chunk == key // chunk) if is_local else key <= query

    def rotate(self, x_THA: Tensor) -> Tensor:
        angle_TJ = torch.arange(len(x_THA))[:, None] * self.frequencies()
        pairs = torch.view_as_complex(x_THA.reshape(*x_THA.shape[:-1], -1, 2))
        turned = pairs * torch.polar(torch.ones_like(angle_TJ), angle_TJ)[:, None]
        return torch.view_as_real(turned).flatten(-2)

    def frequencies(self) -> Tensor:
        rope, head_dim = self.config["rope_parameters"], self.config["head_dim"]
        frequencies = [rope["rope_theta"] ** (-2 * j / head_dim) for j in range(head_dim // 2)]
        if rope["rope_type"] == "default":
            return torch.tensor(frequencies)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        scaled = []
        for frequency in frequencies:
            turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
            if turns < low:
                scaled.append(frequency / rope["factor"])
            elif turns >= high:
                scaled.append(frequency)
            else:
                smooth = (turns - low) / (high - low)
                scaled.append((1 - smooth) * frequency / rope["factor"] + smooth * frequency)
        return torch.tensor(scaled)

    def mlp(self, prefix: str, x_TD: Tensor) -> Tensor:
        gate, up, down = (self.state[f"{prefix}{name}_proj.weight"].T for name in ("gate", "up", "down"))
        return (silu(x_TD @ gate) * (x_TD @ up)) @ down

    def moe(self, prefix: str, x_TD: Tensor) -> Tensor:
        logits_TE = x_TD @ self.state[prefix + "router.weight"].T
        top = logits_TE.topk(self.config["num_experts_per_tok"], dim=-1)
        out_TD = self.mlp(prefix + "shared_expert.", x_TD)
        for token, (logits, experts) in enumerate(zip(top.values, top.indices, strict=True)):
            for logit, expert in zip(logits, experts, strict=True):
                scaled_D = x_TD[token] * sigmoid(logit)
                gate, up = (scaled_D @ self.state[prefix + "experts.gate_up_proj"][expert]).chunk(2)
                out_TD[token] += (silu(gate) * up) @ self.state[prefix + "experts.down_proj"][expert]
        return out_TD
