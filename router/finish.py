"""When a sequence ends of itself."""

from __future__ import annotations

from router.messages import FinishReason
from router.sequence import Sequence


def finish_reason(sequence: Sequence) -> FinishReason | None:
    """Why the newest output token ends the sequence, if it does. An end token wins over the length."""
    return _reason_at(sequence, sequence.num_output_tokens)


def finish_reason_of_resumed(sequence: Sequence) -> FinishReason | None:
    """Why output that a client brings along has already ended, if it has: at whichever of its tokens."""
    reasons = (_reason_at(sequence, count) for count in range(1, sequence.num_output_tokens + 1))
    return next((reason for reason in reasons if reason is not None), None)


def _reason_at(sequence: Sequence, num_output_tokens: int) -> FinishReason | None:
    """The same for the output cut to this many tokens, at least 1."""
    num_tokens = sequence.num_prompt_tokens + num_output_tokens
    is_end_token = sequence.token_ids[num_tokens - 1] in sequence.sampling.end_token_ids
    if is_end_token and num_output_tokens >= sequence.params.min_tokens:
        return FinishReason.STOP
    return FinishReason.LENGTH if num_tokens >= sequence.max_total_tokens else None
