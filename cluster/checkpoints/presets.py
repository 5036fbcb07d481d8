"""Random checkpoints in the published layout: models small enough to test, demonstrate and measure with.

``tiny-scout`` and ``tiny-maverick`` have every feature of their namesakes at a size where a forward pass takes
milliseconds, with weights large enough that a wrong detail shows in the logits. ``mid`` is the model the
benchmarks use. Importing this module does not load torch, so the command line can list the presets at once.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.checkpoints.byte_tokenizer import BOS_TOKEN_ID, EOS_TOKEN_IDS, PAD_TOKEN_ID, write_tokenizer
from cluster.checkpoints.expert_skew import ExpertSkew
from experts.progress import Progress

MAX_SHARD_BYTES = 512 * 2**20

_COMMON: dict[str, Any] = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "attention_bias": False,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": list(EOS_TOKEN_IDS),
    "hidden_act": "silu",
    "no_rope_layers": [],
    "num_experts_per_tok": 1,
    "pad_token_id": PAD_TOKEN_ID,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}

_TINY: dict[str, Any] = {
    **_COMMON,
    "attention_chunk_size": 16,
    "floor_scale": 8,
    "head_dim": 16,
    "hidden_size": 64,
    "initializer_range": 0.2,
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "max_position_embeddings": 4096,
    # 8 x 16 is not hidden_size, so that nothing may take one for the other.
    "num_attention_heads": 8,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "torch_dtype": "float32",
    "vocab_size": 512,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny-scout": {
        **_TINY,
        "interleave_moe_layer_step": 1,
        "num_local_experts": 4,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 32,
        },
        "use_qk_norm": True,
    },
    "tiny-maverick": {
        **_TINY,
        "interleave_moe_layer_step": 2,
        "num_local_experts": 8,
        "use_qk_norm": False,
    },
    "mid": {
        **_COMMON,
        "attention_chunk_size": 8192,
        "floor_scale": 8192,
        "head_dim": 64,
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "interleave_moe_layer_step": 2,
        "intermediate_size": 2048,
        "intermediate_size_mlp": 4096,
        "max_position_embeddings": 131072,
        "num_attention_heads": 16,
        "num_hidden_layers": 12,
        "num_key_value_heads": 4,
        "num_local_experts": 16,
        "torch_dtype": "bfloat16",
        "use_qk_norm": False,
        "vocab_size": 32000,
    },
}


def create_checkpoint(
    preset: str,
    out: str | Path,
    *,
    seed: int = 0,
    expert_skew: str | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Writes a random checkpoint with configuration and tokenizer into the new or empty folder ``out``.

    ``expert_skew`` is ``SHARE:N`` (expert_skew.py). ``config_overrides`` replaces keys of the preset's
    config.json before the weights are planned. The folder appears complete or not at all. ``progress`` is called
    with the bytes of weights written so far and in all.
    Raises ValueError for an unknown preset, a bad skew, or a folder that is not empty.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out must be a new or empty folder, got {out}")
    skew = None if expert_skew is None else ExpertSkew.parse(expert_skew)
    config = {**PRESETS[preset], **(config_overrides or {})}
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _fill(partial, preset, config, seed=seed, skew=skew, max_shard_bytes=max_shard_bytes, progress=progress)
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return out


def _fill(
    folder: Path,
    preset: str,
    config: dict[str, Any],
    *,
    seed: int,
    skew: ExpertSkew | None,
    max_shard_bytes: int,
    progress: Progress | None,
) -> None:
    # Loads torch, which takes seconds; whoever only asks for the presets' names should not pay for it.
    from cluster.checkpoints.random_weights import Initialization, write_random_weights

    if preset == "mid":
        initialization = Initialization(weight_std=None, norm_std=0.0, max_rms=2.0)
    else:
        initialization = Initialization(weight_std=config["initializer_range"], norm_std=0.2, max_rms=32.0)
    folder.chmod(0o755)
    write_random_weights(
        folder, config, initialization, seed=seed, skew=skew, max_shard_bytes=max_shard_bytes, progress=progress
    )
    write_tokenizer(folder)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(config))


def _generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": config["bos_token_id"],
        "do_sample": True,
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
        "temperature": 0.6,
        "top_p": 0.9,
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
