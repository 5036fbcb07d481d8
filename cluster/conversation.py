"""What was said in a chat so far: the messages that the next request sends."""

from __future__ import annotations

from cluster.front.chat import ChatMessage


class Conversation:
    """A system message, if there is one, and turns: a user's message and the assistant's answer to it."""

    def __init__(self, system: str | None = None) -> None:
        self._system = None if system is None else ChatMessage.of_text("system", system)
        self._turns: list[tuple[ChatMessage, ChatMessage]] = []

    @property
    def num_turns(self) -> int:
        return len(self._turns)

    def ask(self, text: str) -> tuple[ChatMessage, ...]:
        """The messages of a request for an answer to text. Nothing is kept before ``add_turn``."""
        system = () if self._system is None else (self._system,)
        said = tuple(message for turn in self._turns for message in turn)
        return (*system, *said, ChatMessage.of_text("user", text))

    def add_turn(self, question: str, answer: str) -> None:
        self._turns.append((ChatMessage.of_text("user", question), ChatMessage.of_text("assistant", answer)))

    def clear(self) -> None:
        """Forgets the turns; the system message stays."""
        self._turns.clear()
