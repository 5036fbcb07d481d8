"""One sequence's part in a step: what goes into the model for it, and where its rows lie in what comes out.

Logit rows of a part, r at position p predicting the token at p + 1:

    prompt_rows                                 sample_row
    [ p, p + 1, ... ]                           last
    as many as prompt logprobs are missing      only when the step reaches the sequence's last token
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from router.batch import SequenceSlice
from router.scheduler import ScheduledSlice
from router.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPart:
    """token_rows are of the step's tokens, prompt_rows and sample_row of its logits."""

    scheduled: ScheduledSlice
    token_rows: slice
    prompt_rows: slice
    sample_row: int | None

    @property
    def sequence(self) -> Sequence:
        return self.scheduled.sequence

    @property
    def num_prompt_rows(self) -> int:
        num_rows: int = self.prompt_rows.stop - self.prompt_rows.start
        return num_rows

    def model_slice(self) -> SequenceSlice:
        """Refers to the sequence's own block tables: good until the next change to them."""
        start, num_tokens = self.scheduled.start, self.scheduled.num_tokens
        return SequenceSlice(
            token_ids=self.sequence.token_ids[start : start + num_tokens],
            start=start,
            global_blocks=self.sequence.global_blocks,
            local_blocks=self.sequence.local_blocks,
            logits_from=num_tokens - self.num_prompt_rows - (self.sample_row is not None),
        )


def lay_out(scheduled: Iterable[ScheduledSlice]) -> list[StepPart]:
    """The parts, back to back in the given order, as build_batch lays them out."""
    parts: list[StepPart] = []
    token_row = logit_row = 0
    for part in scheduled:
        prompt_end = logit_row + _num_prompt_rows(part)
        parts.append(
            StepPart(
                scheduled=part,
                token_rows=slice(token_row, token_row + part.num_tokens),
                prompt_rows=slice(logit_row, prompt_end),
                sample_row=prompt_end if part.samples else None,
            )
        )
        token_row += part.num_tokens
        logit_row = prompt_end + part.samples
    return parts


def _num_prompt_rows(part: ScheduledSlice) -> int:
    """Rows that predict a prompt token whose log probability is missing: from that of the token before it on."""
    sequence = part.sequence
    first_row_position = sequence.num_prompt_tokens - sequence.num_missing_prompt_logprobs - 1
    end = min(part.start + part.num_tokens, sequence.num_prompt_tokens - 1)
    return max(0, end - max(part.start, first_row_position))
