"""What the demo model can do: four tasks on short texts, generated from a seed and answered by plain code.

    sort: kzabq                     abkqz
    reverse: llama                  amall
    add: 37+58                      95
    recall: q7, d2, x9 ... ? d      d2

Whether a prompt is held out follows from the prompt alone (is_held_out), so no prompt can be in both splits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from string import ascii_lowercase
from zlib import crc32

MIN_LETTERS, MAX_LETTERS = 3, 8
MAX_ADDEND = 99
MIN_PAIRS, MAX_PAIRS = 18, 24
HELD_OUT_SHARE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question and its only right answer."""

    task: str
    prompt: str
    answer: str


def make_sort(rng: random.Random) -> Sample:
    letters = _letters(rng)
    return Sample(task="sort", prompt=f"sort: {letters}", answer="".join(sorted(letters)))


def make_reverse(rng: random.Random) -> Sample:
    letters = _letters(rng)
    return Sample(task="reverse", prompt=f"reverse: {letters}", answer=letters[::-1])


def make_add(rng: random.Random) -> Sample:
    left, right = rng.randint(0, MAX_ADDEND), rng.randint(0, MAX_ADDEND)
    return Sample(task="add", prompt=f"add: {left}+{right}", answer=str(left + right))


def make_recall(rng: random.Random) -> Sample:
    return recall_sample(rng, num_pairs=rng.randint(MIN_PAIRS, MAX_PAIRS), num_asked=1)


def recall_sample(rng: random.Random, *, num_pairs: int, num_asked: int) -> Sample:
    """Of any size: the task asks for one key of a long list, the training also for several, and of short lists."""
    keys = rng.sample(ascii_lowercase, num_pairs)
    value_of = {key: rng.randint(0, 9) for key in keys}
    asked = rng.sample(keys, num_asked)
    prompt = f"recall: {_pairs(value_of, keys)} ? {' '.join(asked)}"
    return Sample(task="recall", prompt=prompt, answer=_pairs(value_of, asked))


def _pairs(value_of: Mapping[str, int], keys: Iterable[str]) -> str:
    return ", ".join(f"{key}{value_of[key]}" for key in keys)


TASKS: Mapping[str, Callable[[random.Random], Sample]] = {
    "sort": make_sort,
    "reverse": make_reverse,
    "add": make_add,
    "recall": make_recall,
}


def is_held_out(prompt: str) -> bool:
    """True for one prompt in HELD_OUT_SHARE, the same ones on every machine; the training never sees them."""
    return crc32(prompt.encode()) % HELD_OUT_SHARE == 0


def held_out_samples(task: str, count: int, seed: int) -> list[Sample]:
    """``count`` different samples that the model was not trained on."""
    rng = random.Random(f"{task}:{seed}")
    found: dict[str, Sample] = {}
    while len(found) < count:
        sample = TASKS[task](rng)
        if is_held_out(sample.prompt):
            found[sample.prompt] = sample
    return list(found.values())


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices(ascii_lowercase, k=rng.randint(MIN_LETTERS, MAX_LETTERS)))
