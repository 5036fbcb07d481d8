"""Training rows: conversations of several turns in Llama 4's chat format, filled up with turns while they fit."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.checkpoints.byte_tokenizer import BOS_TOKEN_ID, PAD_TOKEN_ID, SPECIAL_TOKENS
from cluster.checkpoints.demo_tasks import MAX_PAIRS, MIN_PAIRS, TASKS, Sample, is_held_out, recall_sample

# Share of the turns. Those of recall are three times as long.
SHARES = {"sort": 0.2, "reverse": 0.25, "add": 0.3, "recall": 0.25}
SHORTEST_LIST = 2
# Several keys of one list teach more than one. The task itself asks for one.
MOST_ASKED = 4
PATIENCE = 3


def header(role: str) -> list[int]:
    return [SPECIAL_TOKENS["<|header_start|>"], *role.encode(), SPECIAL_TOKENS["<|header_end|>"], *b"\n\n"]


def turn(sample: Sample) -> tuple[list[int], list[int]]:
    """The tokens up to the answer, and the answer with its end token."""
    end = SPECIAL_TOKENS["<|eot|>"]
    question = [*header("user"), *sample.prompt.encode(), end, *header("assistant")]
    return question, [*sample.answer.encode(), end]


class Rows:
    """Batches drawn from one seed. ``difficulty`` from 0 to 1 sets how long the lists of recall are."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def batch(self, num_rows: int, length: int, difficulty: float) -> tuple[Tensor, Tensor]:
        """Token ids [num_rows, length], and 1 where a token is one of an answer."""
        rows = [self._row(length, difficulty) for _ in range(num_rows)]
        return as_batch(rows, length)

    def _row(self, length: int, difficulty: float) -> list[Sample]:
        """Turns until PATIENCE of them in a row did not fit."""
        samples: list[Sample] = []
        room, num_misfits = length - 1, 0
        while num_misfits < PATIENCE:
            sample = self._sample(difficulty)
            num_tokens = sum(map(len, turn(sample)))
            if num_tokens <= room:
                samples.append(sample)
                room, num_misfits = room - num_tokens, 0
            else:
                num_misfits += 1
        return samples

    def _sample(self, difficulty: float) -> Sample:
        (task,) = self._rng.choices(list(SHARES), list(SHARES.values()))
        while True:
            sample = self._recall(difficulty) if task == "recall" else TASKS[task](self._rng)
            if not is_held_out(sample.prompt):
                return sample

    def _recall(self, difficulty: float) -> Sample:
        longest = round(SHORTEST_LIST + difficulty * (MAX_PAIRS - SHORTEST_LIST))
        shortest = round(SHORTEST_LIST + difficulty * (MIN_PAIRS - SHORTEST_LIST))
        num_pairs = self._rng.randint(shortest, longest)
        num_asked = self._rng.randint(1, min(MOST_ASKED, num_pairs))
        return recall_sample(self._rng, num_pairs=num_pairs, num_asked=num_asked)


def as_batch(rows: Sequence[Sequence[Sample]], length: int) -> tuple[Tensor, Tensor]:
    """One row per conversation, padded at the end."""
    ids, is_answer = [], []
    for samples in rows:
        row, marks = [BOS_TOKEN_ID], [0]
        for sample in samples:
            question, answer = turn(sample)
            row += question + answer
            marks += [0] * len(question) + [1] * len(answer)
        padding = length - len(row)
        ids.append(row + [PAD_TOKEN_ID] * padding)
        is_answer.append(marks + [0] * padding)
    return torch.tensor(ids), torch.tensor(is_answer)
