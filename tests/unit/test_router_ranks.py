"""Which routers are asked for a request, and in which order."""

from __future__ import annotations

import pytest

from cluster.balance.prefix_choice import prefix_choice
from cluster.front.prefix_index import prefix_keys
from cluster.front.router_ranks import RouterRanks

PROMPT = prefix_keys(range(41), block_size=4, weights_version=0, cache_salt="")
ANOTHER = prefix_keys(range(100, 141), block_size=4, weights_version=0, cache_salt="")
IDLE: dict[str, int | None] = {"a": 0, "b": 0, "c": 0}


def choice(num_cached: dict[str, int], loads: dict[str, int], max_gap: float = 8) -> list[str]:
    return [*prefix_choice(num_cached=num_cached, loads=loads, num_blocks=10, max_gap=max_gap)]


def test_the_longest_prefix_is_chosen_and_those_that_have_as_much() -> None:
    assert choice({"a": 4, "b": 6, "c": 6}, {"a": 0, "b": 1, "c": 0}) == ["b", "c"]


def test_without_a_prefix_nobody_is_preferred() -> None:
    assert choice({"a": 0, "b": 0}, {"a": 0, "b": 5}) == []


def test_a_whole_prompt_is_worth_the_gap_and_not_one_request_more() -> None:
    assert choice({"a": 10, "b": 0}, {"a": 11, "b": 3}) == ["a"]
    assert choice({"a": 10, "b": 0}, {"a": 12, "b": 3}) == []


def test_a_part_of_a_prompt_is_worth_that_part_of_the_gap() -> None:
    assert choice({"a": 5, "b": 0}, {"a": 4, "b": 0}) == ["a"]
    assert choice({"a": 5, "b": 0}, {"a": 5, "b": 0}) == []
    assert choice({"a": 1, "b": 0}, {"a": 1, "b": 0}) == []


def test_where_the_longest_is_too_busy_the_next_longest_has_its_turn() -> None:
    assert choice({"a": 10, "b": 5, "c": 0}, {"a": 9, "b": 2, "c": 0}) == ["b"]


def test_a_router_that_had_the_prompt_is_asked_before_two_others() -> None:
    ranks = RouterRanks(max_gap=8, max_blocks=100)
    ranks.note_routed("b", PROMPT)
    for _ in range(20):
        first, pair = ranks.ranks(IDLE, prefix=PROMPT)
        assert first == ["b"]
        assert len(set(pair)) == 2
        assert len(ranks.ranks(IDLE, prefix=ANOTHER)) == len(ranks.ranks(IDLE)) == 1


def test_of_a_router_of_which_nothing_is_heard_the_last_word_counts() -> None:
    ranks = RouterRanks(max_gap=8, max_blocks=100)
    ranks.note_routed("b", PROMPT)
    ranks.ranks({"a": 0, "b": 9})
    assert len(ranks.ranks({"a": 0, "b": None}, prefix=PROMPT)) == 1
    assert ranks.ranks({"a": 1, "b": None}, prefix=PROMPT)[0] == ["b"]


def test_a_router_that_was_gone_has_an_empty_cache() -> None:
    ranks = RouterRanks(max_gap=8, max_blocks=100)
    ranks.note_routed("b", PROMPT)
    ranks.ranks({"a": 0, "c": 0})
    assert len(ranks.ranks(IDLE, prefix=PROMPT)) == 1


def test_without_a_gap_prefixes_do_not_count() -> None:
    ranks = RouterRanks(max_gap=0, max_blocks=100)
    ranks.note_routed("b", PROMPT)
    assert len(ranks.ranks(IDLE, prefix=PROMPT)) == 1


@pytest.mark.parametrize(
    ("shunned", "eligible"), [([], {"a", "b", "c"}), (["b"], {"a", "c"}), (["a", "b", "c"], {"a", "b", "c"})]
)
def test_shunned_routers_are_chosen_only_where_there_are_no_others(shunned: list[str], eligible: set[str]) -> None:
    ranks = RouterRanks(max_gap=8, max_blocks=100)
    if shunned == ["b"]:
        ranks.note_routed("b", PROMPT)
    chosen = [ranks.ranks(IDLE, shunned=shunned, prefix=PROMPT) for _ in range(60)]
    assert all(len(set(pair)) == 2 for [pair] in chosen)
    assert set().union(*(pair for [pair] in chosen)) == eligible
