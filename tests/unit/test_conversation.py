"""What a chat sends next, and what a terminal gets to see."""

from __future__ import annotations

import pytest

from cluster.conversation import Conversation
from cluster.front.chat import ChatMessage
from cluster.terminal_text import printable


def spoken(messages: tuple[ChatMessage, ...]) -> list[tuple[str, str]]:
    return [(message.role, "".join(part.text for part in message.content)) for message in messages]


def test_a_question_follows_everything_that_was_said() -> None:
    conversation = Conversation("be brief")
    conversation.add_turn("a?", "A.")
    assert spoken(conversation.ask("b?")) == [
        ("system", "be brief"),
        ("user", "a?"),
        ("assistant", "A."),
        ("user", "b?"),
    ]


def test_a_question_without_an_answer_is_not_kept() -> None:
    conversation = Conversation()
    conversation.ask("lost")
    assert spoken(conversation.ask("again")) == [("user", "again")]


def test_clearing_keeps_the_system_message() -> None:
    conversation = Conversation("be brief")
    conversation.add_turn("a?", "A.")
    conversation.clear()
    assert conversation.num_turns == 0
    assert spoken(conversation.ask("b?")) == [("system", "be brief"), ("user", "b?")]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("llama\n\tpaca", "llama\n\tpaca"),
        ("\x1b[2J", "\N{MIDDLE DOT}[2J"),
        ("\x9b2J\r\x07", "\N{MIDDLE DOT}2J\N{MIDDLE DOT}\N{MIDDLE DOT}"),
        ("right\u202eleft", "right\N{MIDDLE DOT}left"),
        ("añil 駱駝", "añil 駱駝"),
    ],
)
def test_a_terminal_is_shown_nothing_that_it_would_obey(text: str, shown: str) -> None:
    assert printable(text) == shown
