"""How the API writes single tokens: OpenAI shows each by its text and by its bytes."""

from __future__ import annotations

from cluster.front.tokenizer import Tokenizer
from router.messages import TokenLogprobs


class TokenTexts:
    """by_id: write token_id:N for every token, as vLLM's return_tokens_as_token_ids asks for."""

    def __init__(self, tokenizer: Tokenizer, *, by_id: bool = False) -> None:
        self._tokenizer = tokenizer
        self._by_id = by_id

    def text(self, token_id: int) -> str:
        """A token that is a part of a character reads bytes:\\xe2\\x82, as OpenAI writes it; one without a text, by
        its name (<|eot|>), else as token_id:N."""
        return self.text_and_bytes(token_id)[0]

    def text_and_bytes(self, token_id: int) -> tuple[str, list[int] | None]:
        """bytes: None for tokens without a text. Those of all tokens in a row are the text."""
        data = self._tokenizer.token_bytes(token_id)
        values = None if data is None else list(data)
        if self._by_id:
            return f"token_id:{token_id}", values
        if data is None:
            return self._tokenizer.token_name(token_id) or f"token_id:{token_id}", None
        try:
            return data.decode(), values
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), values


def most_likely(entry: TokenLogprobs, num_top: int) -> list[tuple[int, float]]:
    """The num_top first ones; -1: all."""
    return entry.top if num_top < 0 else entry.top[:num_top]
