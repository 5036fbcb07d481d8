"""The text of one choice, out of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.front.detokenizer import Detokenizer
from cluster.front.stop_matcher import StopMatcher


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTokens:
    """num_tokens: how many of the tokens belong to the choice. is_stopped: a stop string ended it with the last of
    these."""

    text: str
    num_tokens: int
    is_stopped: bool


class ChoiceText:
    """Grows with the tokens. What it has returned is a function of the tokens alone, not of how they were grouped:
    whoever takes a choice over pushes the tokens that are known and drops what comes back."""

    def __init__(self, detokenizer: Detokenizer, *, stop: StopMatcher | None = None, min_tokens: int = 0) -> None:
        """min_tokens: in the text of so many first tokens no stop string counts (one may begin there)."""
        self._detokenizer = detokenizer
        self._stop = stop
        self._min_tokens = min_tokens
        self._num_tokens = 0

    def push(self, token_ids: Sequence[int], *, is_last: bool = False) -> ReadTokens:
        """is_last: the choice ends with these tokens, whatever they say. Nothing may be pushed after its end."""
        if self._stop is None:
            text = self._detokenizer.push(token_ids) + (self._detokenizer.finish() if is_last else "")
            return ReadTokens(text=text, num_tokens=len(token_ids), is_stopped=False)
        pieces = []
        for num_read, token_id in enumerate(token_ids, start=1):
            self._num_tokens += 1
            pieces.append(self._scan(self._stop, self._detokenizer.push([token_id])))
            if self._stop.has_matched:
                return ReadTokens(text="".join(pieces), num_tokens=num_read, is_stopped=True)
        if is_last:
            pieces.append(self._scan(self._stop, self._detokenizer.finish()))
            if not self._stop.has_matched:
                pieces.append(self._stop.finish())
        return ReadTokens(text="".join(pieces), num_tokens=len(token_ids), is_stopped=self._stop.has_matched)

    def _scan(self, stop: StopMatcher, text: str) -> str:
        return stop.push(text, may_match=self._num_tokens > self._min_tokens)
