"""Which sequences of a step cannot go on, or must wait, and why. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from experts.placement import ShardId
from router.maxima import Maxima
from router.messages import ErrorCode, MissingExpertPolicy
from router.sequence import Sequence as TokenSequence
from router.sequence_output import StepFailure
from router.step_part import StepPart


def parts_that_wait(parts: Iterable[StepPart], missing_T: torch.Tensor | None) -> list[StepPart]:
    """Those that missed an expert and are to wait for it."""
    if missing_T is None:
        return []
    missing = missing_T.tolist()
    waiting = (part for part in parts if part.sequence.missing_expert_policy is MissingExpertPolicy.WAIT)
    return [part for part in waiting if any(missing[part.token_rows])]


def find_failures(
    parts: Sequence[StepPart], missing_T: torch.Tensor | None, maxima: Maxima, lost: Mapping[ShardId, str]
) -> dict[TokenSequence, StepFailure]:
    """Sequences that end here. maxima: of the step's logits. lost: why shards cannot be reached."""
    failures: dict[TokenSequence, StepFailure] = {}
    missing = [] if missing_T is None else missing_T.tolist()
    is_finite = maxima.values_L.isfinite().tolist()
    for part in parts:
        fails = part.sequence.missing_expert_policy is MissingExpertPolicy.FAIL
        if fails and any(missing[part.token_rows]):
            error = f"an expert cannot be reached: {who_is_lost(lost)}"
            failures[part.sequence] = StepFailure(code=ErrorCode.UNAVAILABLE, error=error)
        elif part.sample_row is not None and not is_finite[part.sample_row]:
            failures[part.sequence] = StepFailure(code=ErrorCode.INTERNAL, error="the logits are not finite")
    return failures


def who_is_lost(lost: Mapping[ShardId, str]) -> str:
    return "; ".join(lost.values()) or "no shard is reported lost"
