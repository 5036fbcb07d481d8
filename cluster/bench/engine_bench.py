"""`bench engine`: decode steps and prefill of contestants that take turns in one run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.bench.contestant import Contestant, Timing
from cluster.bench.plot import Panel
from cluster.bench.race import Race
from cluster.bench.rows import Row
from cluster.bench.summary import percentile, spread_ms

NUM_WARM_UP_STEPS = 3
# A contestant that slept has cold caches and sleeping threads.
NUM_WAKING_STEPS = 1
STEPS_PER_TURN = 4

PANELS = (
    Panel(title="decode step, ms", x="batch", y="p50_ms", series="contestant", where={"bench": "decode"}),
    Panel(title="prefill, tokens/s", x="prompt_tokens", y="tokens_per_s", series="contestant",
          where={"bench": "prefill"}),
)  # fmt: skip
NOTES = (
    "Contestants take turns of a few steps in one run; while one is measured the others are stopped. p50, p10, p90 and "
    "min are of single steps (decode: one token for each sequence of the batch; prefill: one prompt, up to its first "
    "token). cpu_ms is the median CPU time of a step in the contestant's first process, all its threads together; "
    "where other programs run, it says more than the time on the clock. Greedy sampling; nothing is cached.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCases:
    """What is measured. prompt_tokens: of each sequence before it decodes. num_steps, num_prefills: samples."""

    batches: Sequence[int]
    prompt_tokens: int
    prefill_tokens: Sequence[int]
    num_steps: int
    num_prefills: int
    vocab_size: int

    @property
    def num_rounds(self) -> int:
        return -(-self.num_steps // STEPS_PER_TURN)

    @property
    def max_sequences(self) -> int:
        return max(self.batches, default=1)

    @property
    def max_tokens(self) -> int:
        """Of one sequence, with room for every step that is made with it."""
        num_steps = NUM_WARM_UP_STEPS + self.num_rounds * (NUM_WAKING_STEPS + STEPS_PER_TURN)
        return max([self.prompt_tokens + num_steps, *self.prefill_tokens]) + 2

    def prompt(self, num_tokens: int, seed: int) -> list[int]:
        """Random, the same for every contestant; byte-level tokenizers keep their special tokens low."""
        rng = random.Random(seed)
        return [rng.randrange(self.vocab_size // 2, self.vocab_size) for _ in range(num_tokens)]


def run_engine_bench(race: Race, cases: EngineCases, columns: Row) -> list[Row]:
    """columns are what all rows say. Those that are or get absent come last, each in a row that says why."""
    rows: list[Row] = []
    for batch in cases.batches:
        about: Row = {"bench": "decode", "batch": batch, "prompt_tokens": cases.prompt_tokens}
        rows += [_row(about, columns, *result, num_tokens=batch) for result in _decode(race, cases, batch)]
    for num_tokens in cases.prefill_tokens:
        about = {"bench": "prefill", "batch": 1, "prompt_tokens": num_tokens}
        rows += [_row(about, columns, *result, num_tokens=num_tokens) for result in _prefill(race, cases, num_tokens)]
    return rows + race.absences


def _decode(race: Race, cases: EngineCases, batch: int) -> list[tuple[Contestant, Timing]]:
    prompts = [cases.prompt(cases.prompt_tokens, seed) for seed in range(batch)]

    def begin(contestant: Contestant) -> Timing:
        contestant.ask({"do": "begin", "prompts": prompts})
        return contestant.ask({"do": "decode", "steps": NUM_WARM_UP_STEPS})

    def turn(contestant: Contestant, *, number: int) -> Timing:
        contestant.ask({"do": "decode", "steps": NUM_WAKING_STEPS})
        return contestant.ask({"do": "decode", "steps": STEPS_PER_TURN})

    race.each(begin)
    return race.rounds(cases.num_rounds, turn)


def _prefill(race: Race, cases: EngineCases, num_tokens: int) -> list[tuple[Contestant, Timing]]:
    def turn(contestant: Contestant, *, number: int) -> Timing:
        return contestant.ask({"do": "prefill", "prompt": cases.prompt(num_tokens, number)})

    race.each(lambda contestant: turn(contestant, number=cases.num_prefills))
    return race.rounds(cases.num_prefills, turn)


def _row(about: Row, columns: Row, contestant: Contestant, timing: Timing, *, num_tokens: int) -> Row:
    """Routers of one tier work at the same time, so their rates add up."""
    rate = num_tokens * contestant.num_processes / percentile(timing.seconds, 50)
    return {
        **about,
        **contestant.columns,
        **columns,
        **spread_ms(timing.seconds),
        "cpu_ms": round(percentile(timing.cpu_seconds, 50) * 1e3, 2),
        "tokens_per_s": round(rate, 1),
        "num_samples": len(timing.seconds),
    }
