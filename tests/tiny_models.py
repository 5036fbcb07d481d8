"""The tiny Llama 4 models of llama4.md §8 as transformers models, and the same weights in ours.

initializer_range is 0.2 and norm weights are perturbed: with the defaults most mistakes stay below the tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Llama4ForCausalLM, Llama4TextConfig

from experts.checkpoint import Checkpoint
from experts.linear import PackedLinear, pack_linear
from experts.mlp import Mlp
from experts.placement import Slot
from router.config import ModelConfig
from router.model import Llama4Model
from router.weights import load_router

TOLERANCE = 5e-5

SCOUT_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
}
SCOUT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 1,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "attention_chunk_size": 16,
    "floor_scale": 8,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "rope_parameters": SCOUT_ROPE,
}
MAVERICK = SCOUT | {
    "interleave_moe_layer_step": 2,
    "use_qk_norm": False,
    "num_local_experts": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "scout": SCOUT,
    "maverick": MAVERICK,
    "smooth_rope": SCOUT | {"rope_parameters": SCOUT_ROPE | {"factor": 8.0, "high_freq_factor": 4.0}},
    "topk2": SCOUT | {"num_experts_per_tok": 2},
    "explicit_moe_layers": SCOUT | {"moe_layers": [1, 2, 7]},
}
UNEVEN: dict[str, Any] = SCOUT | {
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 14,
    "num_experts_per_tok": 3,
    "num_local_experts": 5,
    "attention_chunk_size": 7,
}
"""Sizes that are no powers of two, chunks so short that bmm has kernels for small matrices."""
LONG: dict[str, Any] = SCOUT | {
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 320,
    "floor_scale": 100,
    "initializer_range": 0.1,
}
"""Chunks longer than a KV split, five query heads on a lone KV head: the shapes the four tiny ones do not have."""
WIDE: dict[str, Any] = SCOUT | {
    "hidden_size": 1152,
    "intermediate_size": 1088,
    "num_hidden_layers": 3,
    "num_attention_heads": 10,
    "head_dim": 64,
    "no_rope_layers": [1, 0, 1],
    "moe_layers": [1, 2],
    "attention_chunk_size": 288,
    "floor_scale": 100,
    "initializer_range": 0.05,
}
"""Wide enough for the matmul kernels that treat some row counts differently."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """One set of weights: transformers' model, our config, and the checkpoint folder both were read from."""

    oracle: Llama4ForCausalLM
    config: ModelConfig
    folder: Path

    @property
    def state(self) -> Mapping[str, torch.Tensor]:
        return self.oracle.state_dict()

    def oracle_logits(self, token_ids: list[int]) -> torch.Tensor:
        """float32 [T, V]; one sequence at a time, because transformers' temperature is wrong under padding."""
        with torch.no_grad():
            return self.oracle(torch.tensor([token_ids])).logits[0]

    def load(self, dtype: torch.dtype = torch.float32) -> Llama4Model:
        weights = load_router(Checkpoint.open(self.folder), self.config, dtype=dtype, device=torch.device("cpu"))
        return Llama4Model(self.config, weights)

    def experts(self, dtype: torch.dtype = torch.float32) -> dict[Slot, Mlp]:
        """Straight from the state dict, so that these tests do not lean on the shards' loader."""
        return {
            Slot(layer, expert): _expert(self.state, layer, expert, dtype)
            for layer in self.config.moe_layers
            for expert in range(self.config.num_local_experts)
        }


def make_tiny(config: Mapping[str, Any], folder: Path, *, seed: int = 0) -> TinyModel:
    """Writes the checkpoint into ``folder`` and reads its config.json back, as a server would."""
    oracle = build_oracle(config, seed)
    oracle.save_pretrained(folder)
    return TinyModel(
        oracle=oracle,
        config=ModelConfig.from_checkpoint_config(Checkpoint.open(folder).config),
        folder=folder,
    )


def build_oracle(config: Mapping[str, Any], seed: int = 0) -> Llama4ForCausalLM:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)
    text_config = Llama4TextConfig(**config)
    model = Llama4ForCausalLM._from_config(text_config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.copy_(1.0 + 0.2 * torch.randn_like(parameter))
    return model


def prompt(length: int, *, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, SCOUT["vocab_size"], (length,), generator=generator).tolist()


def _expert(state: Mapping[str, torch.Tensor], layer: int, expert: int, dtype: torch.dtype) -> Mlp:
    prefix = f"model.layers.{layer}.feed_forward.experts"
    gate, up = state[f"{prefix}.gate_up_proj"][expert].to(dtype).chunk(2, dim=-1)
    down = state[f"{prefix}.down_proj"][expert].to(dtype)
    return Mlp(gate=_packed_transpose(gate), up=_packed_transpose(up), down=_packed_transpose(down))


def _packed_transpose(weight_IO: torch.Tensor) -> PackedLinear:
    return pack_linear(weight_IO.T.contiguous())
