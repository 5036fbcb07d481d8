"""Token ids to text, piece by piece, never splitting a character.

What has been returned is a function of the ids alone, not of how they were grouped into pushes: that lets
another gateway go on with a stream by pushing the ids that were already sent and dropping what comes back.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

from cluster.front.byte_alphabet import byte_characters

REPLACEMENT = "\ufffd"
# No character of UTF-8 has more bytes: what is still broken after as many tokens will stay so.
MAX_BYTES_PER_CHARACTER = 4


class Detokenizer(Protocol):
    """The text of one sequence. Ids without text (special ones, ids beyond the vocabulary) add nothing."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these ids complete; may be empty."""
        ...

    def finish(self) -> str:
        """What was held back for a character that will not come: U+FFFD, or nothing. The last call."""
        ...


class NoDetokenizer:
    """For a checkpoint without a tokenizer: there is no text."""

    def push(self, token_ids: Sequence[int]) -> str:
        return ""

    def finish(self) -> str:
        return ""


class ByteLevelDetokenizer:
    """For byte-level vocabularies: every token is a run of bytes, the stream of all is UTF-8.

    token_of: the token of an id, or None where the id has no text.
    """

    def __init__(self, token_of: Callable[[int], str | None]) -> None:
        self._token_of = token_of
        self._byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(map(self.bytes_of, token_ids)))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)

    def bytes_of(self, token_id: int) -> bytes:
        """Of one token alone, whatever was pushed."""
        token = self._token_of(token_id)
        if token is None:
            return b""
        try:
            return bytes(self._byte_of[character] for character in token)
        except KeyError:
            # An added token: its content is text, not the alphabet of bytes.
            return token.encode()


class PrefixDetokenizer:
    """For any other vocabulary: decodes the last ids again with each new one and returns what is new.

    decode: the text of a list of ids. Decoding starts a few ids back, because a token's text may depend on
    the one before it (a leading space, the bytes of a character).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []  # returned already, decoded again for what follows
        self._held: list[int] = []  # not returned yet

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(self._push_one(token_id) for token_id in token_ids)

    def finish(self) -> str:
        return self._release() if self._held else ""

    def _push_one(self, token_id: int) -> str:
        self._held.append(token_id)
        is_incomplete = self._new_text().endswith(REPLACEMENT)
        if is_incomplete and len(self._held) < MAX_BYTES_PER_CHARACTER:
            return ""
        return self._release()

    def _new_text(self) -> str:
        return self._decode(self._context + self._held)[len(self._decode(self._context)) :]

    def _release(self) -> str:
        text = self._new_text()
        if text:
            self._context = self._held
        # Ids that add no text are forgotten: as context they would hide that a text precedes.
        self._held = []
        return text
