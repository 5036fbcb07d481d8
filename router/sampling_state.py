"""What the sampler remembers of one sequence, and the changes it makes to that sequence's logits.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from router.sampling_params import SamplingParams

BANNED = float("-inf")


class SamplingState:
    """Grows by one token per step; nothing is recounted.

    allowed_V, a bool mask of the tokens that may come next, is None until someone sets it (structured output);
    whoever sets it keeps at least one token allowed that is not an end token.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_ids: Iterable[int],
        output_ids: Iterable[int],
        eos_token_ids: Iterable[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        """output_ids are resumed tokens. eos_token_ids are the model's; ignore_eos makes them plain tokens."""
        self.params = params
        self.end_token_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_token_ids)
        self.allowed_V: torch.Tensor | None = None
        self.num_output_tokens = 0
        self._device = device
        self._output_counts_V: torch.Tensor | None = None
        self._seen_V: torch.Tensor | None = None
        self._bias_ids = self._tensor(list(params.logit_bias), torch.int64)
        self._biases = self._tensor(list(params.logit_bias.values()), torch.float32)
        self._end_ids = self._tensor(sorted(self.end_token_ids), torch.int64)
        if self._has_penalties:
            self._output_counts_V = torch.zeros(vocab_size, dtype=torch.float32, device=device)
            self._seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen_V[self._tensor(list(prompt_ids), torch.int64)] = True
        for token_id in output_ids:
            self.append(token_id)

    @property
    def changes_logits(self) -> bool:
        """Whether adjust() would do anything to the next row."""
        return self._has_penalties or self._must_go_on or self.allowed_V is not None or bool(self.params.logit_bias)

    @property
    def _has_penalties(self) -> bool:
        params = self.params
        return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def _must_go_on(self) -> bool:
        return self.num_output_tokens < self.params.min_tokens and bool(self.end_token_ids)

    def append(self, token_id: int) -> None:
        """Counts one more output token."""
        self.num_output_tokens += 1
        if self._output_counts_V is not None and self._seen_V is not None:
            self._output_counts_V[token_id] += 1
            self._seen_V[token_id] = True

    def adjust(self, logits_V: torch.Tensor) -> None:
        """Changes this sequence's next row, float32, in place: mask, min_tokens, bias, penalties."""
        if self.allowed_V is not None:
            logits_V.masked_fill_(~self.allowed_V, BANNED)
        if self._must_go_on:
            logits_V[self._end_ids] = BANNED
        if self.params.logit_bias:
            logits_V[self._bias_ids] += self._biases
        if self._output_counts_V is not None and self._seen_V is not None:
            self._penalise(logits_V, self._output_counts_V, self._seen_V)

    def _penalise(self, logits_V: torch.Tensor, output_counts_V: torch.Tensor, seen_V: torch.Tensor) -> None:
        params = self.params
        if params.repetition_penalty != 1.0:
            factor_V = torch.where(logits_V > 0, 1.0 / params.repetition_penalty, params.repetition_penalty)
            logits_V.copy_(torch.where(seen_V, logits_V * factor_V, logits_V))
        logits_V -= params.frequency_penalty * output_counts_V
        logits_V -= params.presence_penalty * (output_counts_V > 0)

    def _tensor(self, values: list[int] | list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)
