"""Who computes how many tokens in the next step: decisions only, no tensors.

There is no prefill phase and no decode phase. Every sequence has num_computed_tokens, every step a budget of
tokens, and a sequence that lags behind its own tokens is given some: the chunk of a long prompt, the one token of
a decode and the recomputation after a preemption are the same thing.

First come, first served: running sequences before waiting ones, older before younger in both. When blocks run out
the youngest running sequence gives all its blocks back and waits, at the head, to be recomputed. So the oldest
sequence is never in the way of anything but itself and always moves on; as it fits alone (the engine refuses what
does not), every sequence ends.

A parked sequence (router/parking.py) is passed over and keeps its blocks as long as nobody needs them: it is the
first to be preempted. So whatever is not parked moves on as if the parked ones were not there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from router.block_manager import BlockManager
from router.prefix_cache.prefix import PrefixHit
from router.sequence import Sequence, SequenceStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledSlice:
    """The next num_tokens, at least 1, of a sequence's uncomputed tokens, from position start on.

    Their blocks are in the sequence's tables. samples: the step reaches its last token, so the next can be sampled.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool


@dataclass(slots=True, kw_only=True)
class StepBudget:
    """What is left of a step. A row of prompt logits is as wide as the vocabulary, so those are few."""

    num_tokens: int
    num_prompt_logprob_rows: int

    def share(self, sequence: Sequence) -> int:
        """How many of its uncomputed tokens the sequence may compute."""
        share = min(self.num_tokens, sequence.num_uncomputed_tokens)
        return min(share, self.num_prompt_logprob_rows) if sequence.num_missing_prompt_logprobs else share

    def spend(self, part: ScheduledSlice) -> None:
        self.num_tokens -= part.num_tokens
        if part.sequence.num_missing_prompt_logprobs:
            self.num_prompt_logprob_rows -= part.num_tokens


class Scheduler:
    """Owns the order of the sequences and, through the block manager, their blocks."""

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_prompt_logprob_rows: int,
    ) -> None:
        """Both limits on a step's tokens are at least 1. max_prompt_logprob_rows is for its prompt logprobs."""
        self._block_manager = block_manager
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._max_prompt_logprob_rows = max_prompt_logprob_rows
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_cached_tokens = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences, oldest first."""
        return chain(self._running, self._waiting)

    def add(self, sequence: Sequence) -> None:
        """The sequence must be able to fit alone (BlockManager.can_ever_fit)."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence that has ended; its blocks are free at once."""
        queue = self._running if sequence.status is SequenceStatus.RUNNING else self._waiting
        queue.remove(sequence)
        self._block_manager.free(sequence)
        sequence.status = SequenceStatus.FINISHED

    def schedule(self) -> list[ScheduledSlice]:
        """The next step; empty only when every sequence is parked. Allocates its blocks, preempts, admits."""
        budget = StepBudget(
            num_tokens=self._max_num_batched_tokens, num_prompt_logprob_rows=self._max_prompt_logprob_rows
        )
        scheduled = self._schedule_running(budget)
        return scheduled + self._schedule_waiting(budget, must_admit=not scheduled)

    def _schedule_running(self, budget: StepBudget) -> list[ScheduledSlice]:
        scheduled: list[ScheduledSlice] = []
        for sequence in tuple(self._running):
            if not budget.num_tokens:
                break
            # Victims have not been scheduled yet: they are parked, or younger than whoever needs their blocks.
            if sequence.parked or sequence.status is not SequenceStatus.RUNNING:
                continue
            share = budget.share(sequence)
            num_tokens = self._make_room(sequence, share) if share else 0
            if num_tokens:
                scheduled.append(self._allocate(sequence, num_tokens, budget))
        return scheduled

    def _schedule_waiting(self, budget: StepBudget, *, must_admit: bool) -> list[ScheduledSlice]:
        """must_admit: nobody else moves, so parked sequences give way to the first that waits."""
        scheduled: list[ScheduledSlice] = []
        while (sequence := self._next_waiting()) is not None and budget.share(sequence):
            hit = self._block_manager.find_prefix(sequence)
            if len(self._running) == self._max_num_seqs or not self._block_manager.can_admit(sequence, hit):
                parked = self._youngest_parked() if must_admit and not scheduled else None
                if parked is None:
                    break
                self._preempt(parked)
                continue
            self._waiting.remove(sequence)
            self._admit(sequence, hit)
            num_tokens = self._block_manager.num_tokens_that_fit(sequence, budget.share(sequence))
            scheduled.append(self._allocate(sequence, num_tokens, budget))
        return scheduled

    def _next_waiting(self) -> Sequence | None:
        return next((sequence for sequence in self._waiting if not sequence.parked), None)

    def _youngest_parked(self) -> Sequence | None:
        return next((sequence for sequence in reversed(self._running) if sequence.parked), None)

    def _make_room(self, sequence: Sequence, wanted: int) -> int:
        """Preempts until at least one token fits; 0 when the sequence itself was the youngest."""
        while True:
            num_tokens = self._block_manager.num_tokens_that_fit(sequence, wanted)
            if num_tokens:
                return num_tokens
            victim = self._youngest_parked() or self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return 0

    def _allocate(self, sequence: Sequence, num_tokens: int, budget: StepBudget) -> ScheduledSlice:
        assert num_tokens > 0, "a sequence is scheduled to compute nothing"
        self._block_manager.allocate(sequence, num_tokens)
        part = ScheduledSlice(
            sequence=sequence,
            start=sequence.num_computed_tokens,
            num_tokens=num_tokens,
            samples=num_tokens == sequence.num_uncomputed_tokens,
        )
        budget.spend(part)
        return part

    def _admit(self, sequence: Sequence, hit: PrefixHit) -> None:
        self._block_manager.adopt(sequence, hit)
        sequence.began_at_s = sequence.began_at_s or time.perf_counter()
        if not sequence.num_preemptions:
            sequence.num_cached_tokens = min(hit.num_tokens, sequence.num_prompt_tokens)
            self.num_cached_tokens += sequence.num_cached_tokens
        sequence.status = SequenceStatus.RUNNING
        self._running.append(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._block_manager.free(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1
