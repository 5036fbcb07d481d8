"""When a step is cut in two, where, and in which order its halves go on."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch

from router.batch import InputEmbeddings, SequenceSlice
from router.micro_batches import (
    MIN_TOKENS,
    NUM_SAMPLES,
    STEPS_BETWEEN_TRIALS,
    MicroBatching,
    Pace,
    halve,
    halving_pays,
    take_turns,
)


def part(first: int, count: int, *, logits_from: int, start: int = 0, embeddings: bool = False) -> SequenceSlice:
    values = InputEmbeddings(torch.arange(count), torch.arange(count)[:, None]) if embeddings else None
    return SequenceSlice(
        token_ids=list(range(first, first + count)),
        start=start,
        global_blocks=[first],
        local_blocks=[first],
        logits_from=logits_from,
        embeddings=values,
    )


def wanted_rows(slices: list[SequenceSlice]) -> list[int]:
    return [token_id for each in slices for token_id in each.token_ids[each.logits_from :]]


@pytest.mark.parametrize("counts", [(2,), (1, 1), (1, 1, 1), (5, 1, 1), (1, 1, 9), (3, 8, 2), (64, 64)])
def test_halves_have_the_tokens_of_the_step_in_their_order(counts: tuple[int, ...]) -> None:
    for wanted in range(max(counts) + 1):
        slices = [
            part(100 * index, count, logits_from=min(wanted, count), start=7) for index, count in enumerate(counts)
        ]
        first, second = halve(slices)
        both = [*first, *second]
        assert [t for each in both for t in each.token_ids] == [t for each in slices for t in each.token_ids]
        assert sum(len(each.token_ids) for each in first) == sum(counts) // 2
        assert all(len(each.token_ids) for each in both)
        assert wanted_rows(both) == wanted_rows(slices)
        assert all(each.start - 7 == each.token_ids[0] % 100 for each in both)
        assert all(each.global_blocks == [each.token_ids[0] // 100 * 100] for each in both)


def test_embeddings_of_a_cut_slice_go_with_their_tokens() -> None:
    first, second = halve([part(0, 5, logits_from=4, embeddings=True)])
    for half in (first[0], second[0]):
        assert half.embeddings is not None
        assert half.embeddings.rows_M.tolist() == list(range(len(half.token_ids)))
        assert half.embeddings.values_MD.flatten().tolist() == half.token_ids


def test_passes_take_turns_and_each_comes_to_a_layer_after_the_ones_before_it() -> None:
    seen: list[str] = []

    def run(name: str, layers: int) -> Generator[None, None, str]:
        for layer in range(layers):
            seen.append(f"{name}{layer}")
            yield
        return name

    assert take_turns([run("a", 3), run("b", 3)]) == ["a", "b"]
    assert seen == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert take_turns([run("a", 0), run("b", 0)]) == ["a", "b"]


def pace(seconds: float | None, waited: float = 0.5) -> Pace:
    known = Pace()
    if seconds is not None:
        known.seconds_per_token.extend([seconds] * NUM_SAMPLES)
        known.waited.extend([waited] * NUM_SAMPLES)
    return known


@pytest.mark.parametrize(
    ("whole", "halved", "pays"),
    [
        (pace(None), pace(None), False),
        (pace(1.0), pace(None), True),
        (pace(1.0, waited=0.05), pace(None), False),
        (pace(1.0, waited=0.05), pace(0.5), False),
        (pace(1.0), pace(0.7), True),
        (pace(1.0), pace(0.97), False),
        (pace(1.0), pace(1.3), False),
    ],
)
def test_halving_pays_where_there_was_waiting_and_halves_were_faster(whole: Pace, halved: Pace, pays: bool) -> None:
    assert halving_pays(whole, halved) is pays


def drive(batching: MicroBatching, num_steps: int, *, num_tokens: int, whole_s: float, halved_s: float) -> list[bool]:
    halved: list[bool] = []
    for _ in range(num_steps):
        halved.append(batching.is_halved(num_tokens))
        seconds = halved_s if halved[-1] else whole_s
        batching.note(num_tokens, halved=halved[-1], seconds=seconds, waited_s=seconds / 3)
    return halved


def test_both_ways_are_measured_and_the_better_one_is_kept() -> None:
    gains = drive(MicroBatching(), 30, num_tokens=512, whole_s=1.0, halved_s=0.6)
    assert gains == [False] * NUM_SAMPLES + [True] * (30 - NUM_SAMPLES)
    loses = drive(MicroBatching(), 30, num_tokens=512, whole_s=1.0, halved_s=1.2)
    assert loses == [False] * NUM_SAMPLES + [True] * NUM_SAMPLES + [False] * (30 - 2 * NUM_SAMPLES)


def test_the_other_way_is_tried_again_and_taken_when_it_has_become_better() -> None:
    batching = MicroBatching()
    drive(batching, 4 * STEPS_BETWEEN_TRIALS, num_tokens=512, whole_s=1.0, halved_s=1.2)
    later = drive(batching, 4 * STEPS_BETWEEN_TRIALS, num_tokens=512, whole_s=1.0, halved_s=0.5)
    assert sum(later) > 2 * STEPS_BETWEEN_TRIALS
    assert not later[0]


def test_steps_of_few_tokens_stay_whole_and_sizes_are_measured_apart() -> None:
    batching = MicroBatching()
    assert not any(drive(batching, 20, num_tokens=MIN_TOKENS - 1, whole_s=1.0, halved_s=0.1))
    drive(batching, 20, num_tokens=2048, whole_s=1.0, halved_s=0.5)
    assert batching.is_halved(2000)
    assert not batching.is_halved(256)


def test_a_router_can_be_told_to_halve_always_or_never() -> None:
    assert drive(MicroBatching("on"), 3, num_tokens=2, whole_s=1.0, halved_s=9.0) == [True] * 3
    assert not any(drive(MicroBatching("on"), 3, num_tokens=1, whole_s=1.0, halved_s=0.1))
    assert not any(drive(MicroBatching("off"), 40, num_tokens=2048, whole_s=1.0, halved_s=0.1))
