"""From a step's logits to what each of its sequences gets of them.

Legend: L logit rows of the step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from router.logprobs import token_logprobs
from router.maxima import Maxima
from router.sampler import Sampled, sample
from router.sequence import Sequence
from router.step_part import StepPart


def sample_parts(parts: Iterable[StepPart], logits_LV: torch.Tensor, maxima: Maxima) -> dict[Sequence, Sampled]:
    """The next token of each sequence that has reached its last one. maxima: of logits_LV."""
    rows = {p.sequence: p.sample_row for p in parts if p.sample_row is not None}
    # In a plain decode step every row is sampled, and the logits need not be copied.
    if len(rows) != len(logits_LV):
        wanted = list(rows.values())
        logits_LV, maxima = logits_LV[wanted], maxima.of(wanted)
    return dict(zip(rows, sample(logits_LV, [sequence.sampling for sequence in rows], maxima), strict=True))


def collect_prompt_logprobs(part: StepPart, logits_LV: torch.Tensor) -> None:
    """Adds the log probabilities of the prompt tokens that the part's rows predict to those of its sequence."""
    sequence = part.sequence
    num_top = sequence.params.num_prompt_logprobs
    if not part.num_prompt_rows or sequence.prompt_logprobs is None or num_top is None:
        return
    first = len(sequence.prompt_logprobs)
    targets = sequence.token_ids[first : first + part.num_prompt_rows]
    sequence.prompt_logprobs += token_logprobs(logits_LV[part.prompt_rows], targets, num_top)
