"""Stop strings in a text that comes piece by piece: an Aho-Corasick automaton, a step or so per character.

text so far   ...said the llama. Use
stop string                     User:
                                ^^^ the state: the longest end of the text that begins a stop string. It is all
                                    that has to be held back, and all that has to be known of the text before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class _State:
    """depth: the length of the text it stands for. fallback: the state of the longest shorter end of that text; the
    first state has none. match_length: of the longest stop string that the text ends with, 0 for none."""

    __slots__ = ("depth", "fallback", "match_length", "next")

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.next: dict[str, _State] = {}
        # Filled by StopStrings, once all strings are known.
        self.fallback: _State | None = None
        self.match_length = 0

    def after(self, character: str) -> _State:
        state = self
        while character not in state.next and state.fallback is not None:
            state = state.fallback
        return state.next.get(character, state)


class StopStrings:
    """What to look for; the choices of a request share it. There is at least one string, and none is empty."""

    def __init__(self, strings: Sequence[str]) -> None:
        assert strings
        assert all(strings)
        self.first = _State(0)
        for string in strings:
            self._add(string)
        self._link()

    def _add(self, string: str) -> None:
        state = self.first
        for character in string:
            state = state.next.setdefault(character, _State(state.depth + 1))
        state.match_length = len(string)

    def _link(self) -> None:
        """Breadth first: a fallback is shorter, so it is complete before it is needed."""
        queue = deque([self.first])
        while queue:
            state = queue.popleft()
            for character, child in state.next.items():
                fallback = self.first if state.fallback is None else state.fallback.after(character)
                child.fallback = fallback
                child.match_length = child.match_length or fallback.match_length
                queue.append(child)


class StopMatcher:
    """One text. The stop string that ends first ends it, of several that end together the longest."""

    def __init__(self, strings: StopStrings, *, include: bool) -> None:
        """include: the stop string belongs to the text that is returned, so that nothing is ever held back."""
        self._state = strings.first
        self._include = include
        self._held = ""
        self.has_matched = False

    def push(self, text: str, *, may_match: bool = True) -> str:
        """What is certain to belong to the text now: up to the stop string, if one was completed (``has_matched``;
        nothing may be pushed after that). may_match: whether a stop string may end within this text."""
        pending = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            self._state = self._state.after(character)
            if may_match and self._state.match_length:
                self.has_matched = True
                return pending[: end if self._include else end - self._state.match_length]
            while not self._state.next and self._state.fallback is not None:
                # A whole stop string that does not count, and the beginning of no other.
                self._state = self._state.fallback
        num_held = 0 if self._include else self._state.depth
        num_certain = len(pending) - num_held
        self._held = pending[num_certain:]
        return pending[:num_certain]

    def finish(self) -> str:
        """What was held back for a stop string that will not come. The last call."""
        return self._held
