"""A step in two micro-batches: one computes attention while the other is with the experts, and they change places.

    attention   A1 B1 A2 B2 A3 B3
    experts        A1 B1 A2 B2 A3 B3

It hides the shorter of the two times behind the longer one, and costs that all weights are read twice, by router and
shards. So it pays where steps are long, and where what a router waits for is not computed on its own cores; which is
measured. A row's bits depend on its sequence alone, so they are the same in one batch and in two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from router.batch import InputEmbeddings, SequenceSlice
from router.messages import MicroBatchMode

Result = TypeVar("Result")

# Halves of fewer rows read nearly as many weights as the whole, and take nearly as long.
MIN_TOKENS = 128
# A step that waits less has nothing that could be hidden.
MIN_WAITED_SHARE = 0.1
# What two batches must save.
MIN_GAIN = 0.05
NUM_SAMPLES = 3
# Of steps that go the better way, before the other one is tried again.
STEPS_BETWEEN_TRIALS = 32


def take_turns(passes: Sequence[Generator[None, None, Result]]) -> list[Result]:
    """Runs each up to its next yield, by turns, the first one first. Returns what they return."""
    results: dict[int, Result] = {}
    while len(results) < len(passes):
        for index, each in enumerate(passes):
            if index in results:
                continue
            try:
                next(each)
            except StopIteration as end:
                results[index] = end.value
    return [results[index] for index in range(len(passes))]


def halve(slices: Sequence[SequenceSlice]) -> tuple[list[SequenceSlice], list[SequenceSlice]]:
    """The same tokens in the same order, half of them in each. At least two tokens."""
    room = sum(len(part.token_ids) for part in slices) // 2
    assert room, "there is nothing to halve"
    first: list[SequenceSlice] = []
    second: list[SequenceSlice] = []
    for part in slices:
        num_first = min(room, len(part.token_ids))
        room -= num_first
        if num_first == len(part.token_ids):
            first.append(part)
        elif num_first == 0:
            second.append(part)
        else:
            before, after = _cut(part, num_first)
            first.append(before)
            second.append(after)
    return first, second


def _cut(part: SequenceSlice, num_first: int) -> tuple[SequenceSlice, SequenceSlice]:
    before = after = part.embeddings
    if part.embeddings is not None:
        is_before = part.embeddings.rows_M < num_first
        rows, values = part.embeddings
        before = InputEmbeddings(rows[is_before], values[is_before])
        after = InputEmbeddings(rows[~is_before] - num_first, values[~is_before])
    return (
        replace(
            part,
            token_ids=part.token_ids[:num_first],
            logits_from=min(part.logits_from, num_first),
            embeddings=before,
        ),
        replace(
            part,
            token_ids=part.token_ids[num_first:],
            start=part.start + num_first,
            logits_from=max(0, part.logits_from - num_first),
            embeddings=after,
        ),
    )


@dataclass(slots=True)
class Pace:
    """What the last steps of about one size took, in one way. waited: the share of it spent waiting for experts."""

    seconds_per_token: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_SAMPLES))
    waited: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_SAMPLES))

    @property
    def is_known(self) -> bool:
        return len(self.waited) == NUM_SAMPLES

    @property
    def best_s(self) -> float:
        """Whatever else runs on the machine only makes it longer."""
        return min(self.seconds_per_token)

    @property
    def waited_share(self) -> float:
        return sum(self.waited) / len(self.waited)


def halving_pays(whole: Pace, halved: Pace) -> bool:
    """Whether the next step is to be halved. What has not been measured often enough is measured first."""
    if not whole.is_known or whole.waited_share < MIN_WAITED_SHARE:
        return False
    return not halved.is_known or halved.best_s < whole.best_s * (1 - MIN_GAIN)


@dataclass(slots=True)
class _SizeClass:
    whole: Pace = field(default_factory=Pace)
    halved: Pace = field(default_factory=Pace)
    num_steps: int = 0

    def next_is_halved(self) -> bool:
        self.num_steps += 1
        pays = halving_pays(self.whole, self.halved)
        has_choice = self.halved.is_known and self.whole.waited_share >= MIN_WAITED_SHARE
        return pays != (has_choice and self.num_steps % STEPS_BETWEEN_TRIALS == 0)


class MicroBatching:
    """Decides for each step, by what steps of about its size took before."""

    def __init__(self, mode: MicroBatchMode = "auto") -> None:
        """on, off: every step that has two tokens, or none."""
        self._mode = mode
        self._classes: dict[int, _SizeClass] = {}

    def is_halved(self, num_tokens: int) -> bool:
        """Whether the next step, of so many tokens, is to be halved."""
        if self._mode != "auto":
            return self._mode == "on" and num_tokens > 1
        if num_tokens < MIN_TOKENS:
            return False
        return self._class_of(num_tokens).next_is_halved()

    def note(self, num_tokens: int, *, halved: bool, seconds: float, waited_s: float) -> None:
        """What a step took."""
        if self._mode != "auto" or num_tokens < MIN_TOKENS:
            return
        size = self._class_of(num_tokens)
        pace = size.halved if halved else size.whole
        pace.seconds_per_token.append(seconds / num_tokens)
        pace.waited.append(waited_s / seconds)

    def _class_of(self, num_tokens: int) -> _SizeClass:
        """Sizes within a factor of two."""
        return self._classes.setdefault((num_tokens - 1).bit_length(), _SizeClass())
