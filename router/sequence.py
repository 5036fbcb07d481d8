"""A sequence: what the scheduler advances, one per choice of a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from router.messages import GenerateRequest, MissingExpertPolicy, TokenLogprobs
from router.prefix_cache.block_hash import BlockHash
from router.sampling_params import SamplingParams
from router.sampling_state import SamplingState


class SequenceStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Tokens and progress of one sequence.

    token_ids: prompt, then output. The first num_computed_tokens of them have keys and values in the cache; a
    sequence whose every token but the last is computed is decoding, any other is prefilling or recomputing, and
    nothing but this number tells them apart.
    max_total_tokens: prompt and output may not grow beyond it.
    parked: it needs an expert that no living shard has and is not scheduled; router/parking.py alone changes it.
    global_blocks, local_blocks: the block tables, by logical block; the block manager alone changes them.
    block_hashes: the chain over the first full blocks, as far as it was needed; grown by the block manager.
    prompt_logprobs: None unless asked for; entry i belongs to prompt position i, collected as the prompt is
    computed, taken away when sent.
    began_at_s: of time.perf_counter(), when the first step was scheduled; set by the scheduler. has_spoken: whether
    an output has been made of it.
    """

    request: GenerateRequest
    missing_expert_policy: MissingExpertPolicy
    root_hash: BlockHash
    max_total_tokens: int
    sampling: SamplingState
    token_ids: list[int]
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    degraded: bool = False
    began_at_s: float | None = None
    has_spoken: bool = False
    parked: bool = False
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    global_blocks: list[int] = field(default_factory=list)
    local_blocks: list[int] = field(default_factory=list)
    block_hashes: list[BlockHash] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Resumed tokens included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_missing_prompt_logprobs(self) -> int:
        """Prompt positions whose log probabilities are wanted and not yet collected."""
        return 0 if self.prompt_logprobs is None else self.num_prompt_tokens - len(self.prompt_logprobs)
