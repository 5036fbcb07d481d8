"""Training rows: conversations of several turns in Llama 4's chat format, filled up with turns while they fit."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, digits

import torch
from torch import Tensor

from cluster.checkpoints.byte_tokenizer import BOS_TOKEN_ID, PAD_TOKEN_ID, SPECIAL_TOKENS
from cluster.checkpoints.demo_tasks import MAX_PAIRS, MIN_PAIRS, TASKS, Sample, is_held_out, recall_sample

SHORTEST_ECHO, LONGEST_ECHO = 6, 40
SHORTEST_LIST = 3
# Several keys of one list teach more than one. The task itself asks for one.
MOST_ASKED = 4
MOST_REPEATS = 16
PATIENCE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Question and answer as tokens; is_learned is 1 where the model should have predicted the token."""

    token_ids: list[int]
    is_learned: list[int]


def turn_of(sample: Sample, learned: Collection[int] = ()) -> Turn:
    """The answer and its end are learned, and the prompt's bytes at the indices ``learned``."""
    end = SPECIAL_TOKENS["<|eot|>"]
    prompt, answer = sample.prompt.encode(), [*sample.answer.encode(), end]
    before, after = header("user"), [end, *header("assistant")]
    in_prompt = [int(index in learned) for index in range(len(prompt))]
    return Turn(
        token_ids=[*before, *prompt, *after, *answer],
        is_learned=[0] * len(before) + in_prompt + [0] * len(after) + [1] * len(answer),
    )


def header(role: str) -> list[int]:
    return [SPECIAL_TOKENS["<|header_start|>"], *role.encode(), SPECIAL_TOKENS["<|header_end|>"], *b"\n\n"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """list_growth: from 0 to 1, how long the lists of recall are. echo_share: of the rows, those that are one random
    string over and over. They teach to look up what followed a character the last time, which recall is made of and
    would be long in finding. shares: of the turns, by task. repeating_share: of the lists of recall, those in which a
    pair comes again and can be learned where it stands: by far the most to learn from one list. The task itself repeats
    none."""

    list_growth: float
    echo_share: float
    shares: Mapping[str, float]
    repeating_share: float


class Rows:
    """Batches drawn from one seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def batch(self, num_rows: int, length: int, mix: Mix) -> tuple[Tensor, Tensor]:
        """Token ids [num_rows, length], and 1 where a token is to be learned."""
        rows = []
        for _ in range(num_rows):
            is_echo = self._rng.random() < mix.echo_share
            rows.append([self._echo(length)] if is_echo else self._row(length, mix))
        return as_batch(rows, length)

    def _echo(self, length: int) -> Turn:
        """To the end of the row; learned from the second time on, where one character tells the next."""
        period = self._rng.randint(SHORTEST_ECHO, LONGEST_ECHO)
        text = "".join(self._rng.choices(ascii_lowercase + digits, k=period))
        room = length - len(turn_of(Sample(task="echo", prompt="", answer="")).token_ids) - 1
        prompt = (text * (room // period + 1))[:room]
        return turn_of(Sample(task="echo", prompt=prompt, answer=""), learned=range(period + 1, room))

    def _row(self, length: int, mix: Mix) -> list[Turn]:
        """Turns until PATIENCE of them in a row did not fit."""
        turns: list[Turn] = []
        room, num_misfits = length - 1, 0
        while num_misfits < PATIENCE:
            turn = self._turn(mix)
            if len(turn.token_ids) <= room:
                turns.append(turn)
                room, num_misfits = room - len(turn.token_ids), 0
            else:
                num_misfits += 1
        return turns

    def _turn(self, mix: Mix) -> Turn:
        (task,) = self._rng.choices(list(mix.shares), list(mix.shares.values()))
        while True:
            sample = self._recall(mix.list_growth) if task == "recall" else TASKS[task](self._rng)
            if is_held_out(sample.prompt):
                continue
            if task == "recall" and self._rng.random() < mix.repeating_share:
                return self._with_repeats(sample)
            return turn_of(sample)

    def _recall(self, list_growth: float) -> Sample:
        longest = round(SHORTEST_LIST + list_growth * (MAX_PAIRS - SHORTEST_LIST))
        shortest = round(SHORTEST_LIST + list_growth * (MIN_PAIRS - SHORTEST_LIST))
        num_pairs = self._rng.randint(shortest, longest)
        num_asked = self._rng.randint(1, min(MOST_ASKED, num_pairs))
        return recall_sample(self._rng, num_pairs=num_pairs, num_asked=num_asked)

    def _with_repeats(self, sample: Sample) -> Turn:
        """The same question with pairs of the list put in again, anywhere behind their first place."""
        pairs_text, question = sample.prompt.removeprefix("recall: ").split(" ?")
        pairs = pairs_text.split(", ")
        for _ in range(self._rng.randint(1, min(MOST_REPEATS, 2 * len(pairs)))):
            place = self._rng.randint(1, len(pairs))
            pairs.insert(place, self._rng.choice(pairs[:place]))
        repeated = [index for index, pair in enumerate(pairs) if pair in pairs[:index]]
        first_value = len("recall: a")
        return turn_of(
            Sample(task=sample.task, prompt=f"recall: {', '.join(pairs)} ?{question}", answer=sample.answer),
            learned={first_value + index * len("a7, ") for index in repeated},
        )


def as_batch(rows: Sequence[Sequence[Turn]], length: int) -> tuple[Tensor, Tensor]:
    """One row per conversation, padded at the end."""
    ids, is_learned = [], []
    for turns in rows:
        row, marks = [BOS_TOKEN_ID], [0]
        for turn in turns:
            row += turn.token_ids
            marks += turn.is_learned
        padding = length - len(row)
        ids.append(row + [PAD_TOKEN_ID] * padding)
        is_learned.append(marks + [0] * padding)
    return torch.tensor(ids), torch.tensor(is_learned)
