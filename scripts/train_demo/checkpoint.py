"""The demo model's configuration, and its checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cluster.checkpoints.byte_tokenizer import BOS_TOKEN_ID, EOS_TOKEN_IDS, PAD_TOKEN_ID, VOCAB_SIZE, write_tokenizer
from cluster.checkpoints.random_weights import plan_weights
from cluster.checkpoints.safetensors_writer import write_checkpoint_tensors

CONFIG: dict[str, Any] = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "attention_bias": False,
    "attention_chunk_size": 48,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": list(EOS_TOKEN_IDS),
    "floor_scale": 48,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "max_position_embeddings": 1024,
    "no_rope_layers": [1, 0, 1, 0, 1, 0],
    "num_attention_heads": 4,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "num_local_experts": 16,
    "pad_token_id": PAD_TOKEN_ID,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_qk_norm": True,
    "vocab_size": VOCAB_SIZE,
}
GENERATION_CONFIG: dict[str, Any] = {
    "bos_token_id": BOS_TOKEN_ID,
    "do_sample": False,
    "eos_token_id": list(EOS_TOKEN_IDS),
    "pad_token_id": PAD_TOKEN_ID,
}
# For other software; Arriero renders chats by itself, in ids.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|header_start|>' + ('ipython' if message.role == 'tool' else message.role) + '<|header_end|>\\n\\n' }}
    {%- if message.content is string %}
        {%- set text = message.content %}
    {%- else %}
        {%- set text = message.content | map(attribute='text') | join %}
    {%- endif %}
    {{- (text | trim if message.role == 'system' else text) + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
"""


def rounded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as they are stored, in float32."""
    return {name: tensor.detach().bfloat16().float() for name, tensor in state.items()}


def write_checkpoint(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Weights in bfloat16, half the size. config.json asks to compute in float32, where CPUs are fast and exact."""
    specs = [weight.spec for weight in plan_weights(CONFIG | {"torch_dtype": "bfloat16"})]
    write_checkpoint_tensors(
        folder, specs, lambda name: [state[name].detach().bfloat16().contiguous()], max_shard_bytes=2**30
    )
    write_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    tokenizer_config = json.loads(path.read_text()) | {"chat_template": CHAT_TEMPLATE}
    path.write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    for name, value in (("config.json", CONFIG), ("generation_config.json", GENERATION_CONFIG)):
        (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
