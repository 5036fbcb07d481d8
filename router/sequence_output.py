"""What a step tells the world about a sequence."""

from __future__ import annotations

import time
from dataclasses import dataclass

from router.messages import ErrorCode, FinishReason, SequenceOutput
from router.sampler import Sampled
from router.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailure:
    """Why one sequence cannot go on after a step, the others unharmed."""

    code: ErrorCode
    error: str


def sequence_output(
    sequence: Sequence,
    *,
    sampled: Sampled | None = None,
    finish_reason: FinishReason | None = None,
    failure: StepFailure | None = None,
) -> SequenceOutput:
    """Prompt log probabilities leave with the first token, and only once."""
    since_begin_s = None
    if not sequence.has_spoken:
        sequence.has_spoken = True
        since_begin_s = None if sequence.began_at_s is None else time.perf_counter() - sequence.began_at_s
    prompt_logprobs = None
    if sampled is not None:
        prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
    return SequenceOutput(
        request_id=sequence.request_id,
        attempt=sequence.request.attempt,
        token_ids=[] if sampled is None else [sampled.token_id],
        logprobs=None if sampled is None or sampled.logprobs is None else [sampled.logprobs],
        prompt_logprobs=prompt_logprobs,
        finish_reason=finish_reason,
        error=None if failure is None else failure.error,
        error_code=None if failure is None else failure.code,
        degraded=sequence.degraded,
        num_cached_tokens=sequence.num_cached_tokens,
        since_begin_s=since_begin_s,
    )
