"""Text out of tokens, up to a stop string. The tokens are bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.front.byte_alphabet import byte_characters
from cluster.front.choice_text import ChoiceText
from cluster.front.detokenizer import ByteLevelDetokenizer
from cluster.front.stop_matcher import StopMatcher, StopStrings

ALPHABET = byte_characters()


def token_of(token_id: int) -> str | None:
    return ALPHABET[token_id] if token_id < len(ALPHABET) else None


def choice_text(*stop: str, include: bool = False, min_tokens: int = 0) -> ChoiceText:
    matcher = StopMatcher(StopStrings(stop), include=include) if stop else None
    return ChoiceText(ByteLevelDetokenizer(token_of), stop=matcher, min_tokens=min_tokens)


def test_tokens_after_the_one_that_completes_the_stop_do_not_belong_to_the_choice() -> None:
    read = choice_text("lo w").push(list(b"hello world"))
    assert (read.text, read.num_tokens, read.is_stopped) == ("hel", len("hello w"), True)


def test_what_may_begin_a_stop_waits_for_the_tokens_that_tell() -> None:
    text = choice_text("end")
    assert [text.push([byte]).text for byte in b"ten.en"] == ["t", "", "", "en.", "", ""]
    assert text.push([], is_last=True).text == "en"


def test_a_stop_that_is_included_holds_nothing_back() -> None:
    text = choice_text("end", include=True)
    reads = [text.push([byte]) for byte in b"an end"]
    assert "".join(read.text for read in reads) == "an end"
    assert [read.text for read in reads] == list("an end")
    assert [read.is_stopped for read in reads] == [False] * 5 + [True]


def test_a_character_of_several_tokens_is_a_stop_with_its_last_one() -> None:
    read = choice_text("🦙").push(list("a🦙b".encode()))
    assert (read.text, read.num_tokens, read.is_stopped) == ("a", 5, True)


@pytest.mark.parametrize(
    ("min_tokens", "kept"), [(0, "a"), (2, "a"), (3, "a.b.c"), (4, "a.b.c"), (6, "a.b.c"), (7, "a.b.c.d.")]
)
def test_a_stop_counts_once_it_ends_after_the_first_tokens(min_tokens: int, kept: str) -> None:
    text = choice_text(".b", ".d", min_tokens=min_tokens)
    read = text.push(list(b"a.b.c.d."), is_last=True)
    assert read.text == kept


def test_a_stop_may_begin_in_the_first_tokens() -> None:
    read = choice_text("ab", min_tokens=1).push(list(b"ab"))
    assert (read.text, read.is_stopped) == ("", True)


def test_a_broken_character_at_the_end_can_complete_a_stop() -> None:
    read = choice_text("\ufffd").push(list("é".encode())[:1], is_last=True)
    assert (read.text, read.num_tokens, read.is_stopped) == ("", 1, True)


def test_special_tokens_have_no_text_and_do_not_interrupt_a_stop() -> None:
    read = choice_text("ab").push([*b"a", 300, *b"b"])
    assert (read.text, read.num_tokens, read.is_stopped) == ("", 3, True)


@given(
    data=st.text("ab🦙", max_size=12).map(lambda text: list(text.encode())),
    stop=st.lists(st.text("ab🦙", min_size=1, max_size=3), max_size=2),
    cut=st.integers(0, 30),
    include=st.booleans(),
    min_tokens=st.integers(0, 6),
)
def test_a_choice_can_be_taken_over_after_any_token(
    data: list[int], stop: list[str], cut: int, include: bool, min_tokens: int
) -> None:
    def made() -> ChoiceText:
        return choice_text(*stop, include=include, min_tokens=min_tokens)

    whole = made().push(data, is_last=True)
    first, second = made(), made()
    before = first.push(data[:cut])
    if before.is_stopped:
        assert (before.text, before.num_tokens) == (whole.text, whole.num_tokens)
        return
    assert second.push(data[:cut]).text == before.text
    after = second.push(data[cut:], is_last=True)
    assert before.text + after.text == whole.text
    assert before.num_tokens + after.num_tokens == whole.num_tokens
    assert after.is_stopped == whole.is_stopped
