"""Special tokens in a text in which users have a say, so that they can be told from their spelling.

A mark is two lone surrogates: a code that no valid text contains, so nobody but us can write one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_FIRST, _SECOND = 0xD800, 0xDC00
_RANGE = 0x400
_MARK = re.compile("[\ud800-\udbff][\udc00-\udfff]")


class SpecialMarks:
    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        """special_tokens: ids by name."""
        self._ids = special_tokens
        self._names = tuple(special_tokens)
        assert len(self._names) <= _RANGE * _RANGE
        self._mark_of = {name: _mark(index) for index, name in enumerate(self._names)}
        # The longest first: one name may begin another.
        spellings = sorted(map(re.escape, self._names), key=len, reverse=True)
        self._spelling = re.compile("|".join(spellings)) if spellings else None

    def mark(self, text: str) -> str:
        """The text with marks in place of every special token that is spelled out in it."""
        if self._spelling is None:
            return text
        return self._spelling.sub(lambda found: self._mark_of[found[0]], text)

    def find_spelling(self, text: str) -> str | None:
        """A special token that is spelled out in the text, if there is one; marks are none."""
        found = None if self._spelling is None else self._spelling.search(text)
        return None if found is None else found[0]

    def encode(self, marked: str, encode_text: Callable[[str], list[int]]) -> list[int]:
        """Ids of a marked text: encode_text's for what is between the marks. Raises what encode_text raises."""
        token_ids: list[int] = []
        end = 0
        for found in _MARK.finditer(marked):
            token_ids += encode_text(marked[end : found.start()])
            token_ids.append(self._ids[self._names[_index(found[0])]])
            end = found.end()
        return token_ids + encode_text(marked[end:])


def _mark(index: int) -> str:
    return chr(_FIRST + index // _RANGE) + chr(_SECOND + index % _RANGE)


def _index(mark: str) -> int:
    return (ord(mark[0]) - _FIRST) * _RANGE + ord(mark[1]) - _SECOND
