"""The sizes an engine is built with."""

from __future__ import annotations

from dataclasses import dataclass

from router.sampling_params import WHOLE_VOCABULARY


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """max_model_len: tokens of prompt and output together. num_*_blocks count the null block. max_logprobs -1: no
    limit. max_prompt_logprob_rows: positions per step whose whole row of logits is kept for prompt logprobs.

    Raises ValueError naming field and value.
    """

    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    num_global_blocks: int
    num_local_blocks: int
    block_size: int
    max_logprobs: int = 20
    max_prompt_logprob_rows: int = 256

    def __post_init__(self) -> None:
        self._require_at_least(2, "max_model_len", "num_global_blocks", "num_local_blocks")
        self._require_at_least(1, "max_num_batched_tokens", "max_num_seqs", "block_size", "max_prompt_logprob_rows")
        self._require_at_least(WHOLE_VOCABULARY, "max_logprobs")

    def _require_at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
