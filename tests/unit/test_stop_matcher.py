"""Stop strings in a text that comes in pieces, against a search of the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.front.stop_matcher import StopMatcher, StopStrings

# Few characters, so that strings overlap, repeat and contain each other; one of them outside the BMP.
words = st.text("ab🦙", min_size=1, max_size=5)
stops = st.lists(words, min_size=1, max_size=5)
texts = st.text("ab🦙", max_size=40)


def end_of_stop(text: str, stop: Sequence[str], *, earliest_end: int = 1) -> tuple[int, int] | None:
    """The plain search: where the stop string that ends first begins and ends, of several the longest."""
    found = [
        (end, end - len(string))
        for string in stop
        for end in range(earliest_end, len(text) + 1)
        if text[:end].endswith(string)
    ]
    if not found:
        return None
    end, start = min(found)
    return start, end


def possible_beginning(text: str, stop: Sequence[str]) -> int:
    """The length of the longest end of the text that a longer text could complete to a stop string."""
    beginnings = {string[:length] for string in stop for length in range(1, len(string))}
    return max((length for length in range(1, len(text) + 1) if text[-length:] in beginnings), default=0)


def pieces_of(text: str, cuts: Sequence[int]) -> list[str]:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


@given(text=texts, stop=stops, cuts=st.lists(st.integers(0, 40), max_size=8), include=st.booleans())
def test_however_the_text_is_split_it_ends_where_a_search_of_the_whole_finds_the_stop(
    text: str, stop: list[str], cuts: list[int], include: bool
) -> None:
    matcher = StopMatcher(StopStrings(stop), include=include)
    returned = ""
    for piece in pieces_of(text, cuts):
        returned += matcher.push(piece)
        if matcher.has_matched:
            break
    found = end_of_stop(text, stop)
    assert matcher.has_matched == (found is not None)
    if found is None:
        assert returned + matcher.finish() == text
    else:
        start, end = found
        assert returned == text[: end if include else start]


@given(text=texts, stop=stops, cuts=st.lists(st.integers(0, 40), max_size=8))
def test_exactly_what_may_begin_a_stop_is_held_back(text: str, stop: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(StopStrings(stop), include=False)
    returned, pushed = "", ""
    for piece in pieces_of(text, cuts):
        pushed += piece
        if end_of_stop(pushed, stop):
            return
        returned += matcher.push(piece)
        assert returned == pushed[: len(pushed) - possible_beginning(pushed, stop)]


@given(text=texts, stop=stops, deaf=st.integers(0, 40), include=st.booleans())
def test_a_stop_counts_only_if_it_ends_where_it_may(text: str, stop: list[str], deaf: int, include: bool) -> None:
    matcher = StopMatcher(StopStrings(stop), include=include)
    returned = matcher.push(text[:deaf], may_match=False) + matcher.push(text[deaf:])
    found = end_of_stop(text, stop, earliest_end=deaf + 1)
    assert matcher.has_matched == (found is not None)
    if found is None:
        assert returned + matcher.finish() == text
    elif include:
        assert returned == text[: found[1]]
    else:
        assert returned == text[: found[0]]


@given(text=texts, stop=stops, deaf=st.integers(0, 40))
def test_a_stop_that_does_not_count_is_not_held_back(text: str, stop: list[str], deaf: int) -> None:
    matcher = StopMatcher(StopStrings(stop), include=False)
    first = text[:deaf]
    assert matcher.push(first, may_match=False) == first[: len(first) - possible_beginning(first, stop)]


@pytest.mark.parametrize(
    ("stop", "text", "kept"),
    [
        (["User:"], "Hello. User: hi", "Hello. "),
        (["b", "abc"], "xabc", "xa"),
        (["abcd", "bc"], "xabcd", "xa"),
        (["bc", "abc"], "xabc", "x"),
        (["aab"], "aaab", "a"),
        (["\ufffd"], "a\ufffdb", "a"),
    ],
)
def test_the_stop_that_ends_first_counts_and_of_several_the_longest(stop: list[str], text: str, kept: str) -> None:
    matcher = StopMatcher(StopStrings(stop), include=False)
    assert "".join(matcher.push(character) for character in text if not matcher.has_matched) == kept
    assert matcher.has_matched


def test_the_work_is_in_proportion_to_the_text() -> None:
    """A text that always almost matches makes a search that begins anew look back the most."""
    looks: list[str] = []

    class CountedDict(dict):  # type: ignore[type-arg]
        def __contains__(self, character: object) -> bool:
            looks.append(str(character))
            return super().__contains__(character)

    strings = StopStrings(["a" * 200 + "b", "a" * 255 + "c"])
    states = [strings.first]
    for state in states:
        states += state.next.values()
        state.next = CountedDict(state.next)
    matcher = StopMatcher(strings, include=False)
    text = ("a" * 300 + "d") * 20
    for character in text:
        matcher.push(character)
    assert not matcher.has_matched
    assert len(text) <= len(looks) <= 2 * len(text)
