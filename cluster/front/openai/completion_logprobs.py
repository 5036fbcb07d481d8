"""Log probabilities as /v1/completions lists them: columns, one entry per token."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.front.detokenizer import Detokenizer
from cluster.front.openai.payloads import CompletionLogprobs
from cluster.front.openai.token_texts import TokenTexts, most_likely
from router.messages import TokenLogprobs


class LogprobColumns:
    """Of one choice. Knows where in the choice's text the next token begins."""

    def __init__(self, tokens: TokenTexts, *, num_top: int, detokenizer: Detokenizer) -> None:
        self._tokens = tokens
        self._num_top = num_top
        self._detokenizer = detokenizer
        self._offset = 0

    def columns(self, entries: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        """Of the tokens that come next."""
        return CompletionLogprobs(
            tokens=[self._tokens.text(entry.token_id) for entry in entries],
            token_logprobs=[entry.logprob for entry in entries],
            top_logprobs=[self._top(entry) for entry in entries],
            text_offset=[self._next_offset(entry.token_id, self._detokenizer) for entry in entries],
        )

    def prompt_columns(
        self, text: str, token_ids: Sequence[int], entries: Sequence[TokenLogprobs], detokenizer: Detokenizer
    ) -> CompletionLogprobs:
        """Of the prompt that the text of the choice begins with. entries: for its second token and all after it; the
        first follows nothing and has none. detokenizer: a new one."""
        columns = CompletionLogprobs(
            tokens=[self._tokens.text(token_id) for token_id in token_ids],
            token_logprobs=[None, *(entry.logprob for entry in entries)],
            top_logprobs=[None, *(self._top(entry) for entry in entries)],
            text_offset=[self._next_offset(token_id, detokenizer) for token_id in token_ids],
        )
        self._offset = len(text)
        return columns

    def _next_offset(self, token_id: int, detokenizer: Detokenizer) -> int:
        offset = self._offset
        self._offset += len(detokenizer.push([token_id]))
        return offset

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The most likely ones, and the token itself wherever it stands."""
        top: dict[str, float] = {}
        for token_id, logprob in [*most_likely(entry, self._num_top), (entry.token_id, entry.logprob)]:
            top.setdefault(self._tokens.text(token_id), logprob)
        return top


def joined(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[entry for part in parts for entry in part.tokens],
        token_logprobs=[entry for part in parts for entry in part.token_logprobs],
        top_logprobs=[entry for part in parts for entry in part.top_logprobs],
        text_offset=[entry for part in parts for entry in part.text_offset],
    )
