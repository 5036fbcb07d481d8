"""Text to token ids and back, by a checkpoint's tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from cluster.front.detokenizer import (
    REPLACEMENT,
    ByteLevelDetokenizer,
    Detokenizer,
    NoDetokenizer,
    PrefixDetokenizer,
)


class Tokenizer:
    """The tokenizer of a checkpoint folder; without a tokenizer.json in it, one that refuses text.

    Ids at or above num_tokens are legal (a model's vocabulary is often padded) and have no text.
    Raises ValueError naming the file when a file of the folder cannot be read as what it should be.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._tokenizer = _load(self._folder / "tokenizer.json")
        self._special_ids: dict[str, int] = {}
        if self._tokenizer is not None:
            # Special tokens that a user spells out stay plain text; only we put real ones in.
            self._tokenizer.encode_special_tokens = True
            added = self._tokenizer.get_added_tokens_decoder()
            self._special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        named_tokens = self._find_named_tokens()
        self.bos_token_id = self._find_bos(named_tokens)
        name_of = {token_id: name for name, token_id in self._special_ids.items()}
        bos_token = {"bos_token": name_of[self.bos_token_id]} if self.bos_token_id in name_of else {}
        # Special tokens by the parts they play, as "bos_token".
        self.named_tokens: Mapping[str, str] = MappingProxyType(named_tokens | bos_token)
        self._ids_without_text = frozenset(self._special_ids.values())
        self._is_byte_level = self._tokenizer is not None and _is_byte_level(self._tokenizer)
        self._single_tokens = ByteLevelDetokenizer(self._token_of)

    @property
    def has_text(self) -> bool:
        """Whether text can be encoded and decoded at all."""
        return self._tokenizer is not None

    @property
    def num_tokens(self) -> int:
        """Tokens with a text or a name; the model's vocabulary may be larger. 0 without a tokenizer."""
        return 0 if self._tokenizer is None else self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The ids of all special tokens, by name. Empty without a tokenizer."""
        return MappingProxyType(self._special_ids)

    def special_token_id(self, token: str) -> int | None:
        """The id of a special token by its name, None if there is none. Raises ValueError without a tokenizer."""
        self._require()
        return self._special_ids.get(token)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, nothing put in front. Special tokens spelled out in it stay plain text.

        Raises ValueError without a tokenizer, and for a text that is not valid Unicode.
        """
        # The library reports a lone surrogate as a type error; Python says what is wrong.
        text.encode()
        return list(self._require().encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text that starts a sequence: the begin-of-text token, if the model has one, once.

        Raises ValueError as encode does, and for an empty text.
        """
        if not text:
            raise ValueError("text must not be empty")
        bos = [] if self.bos_token_id is None else [self.bos_token_id]
        return bos + self.encode(text)

    def decode(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """The text of ids; broken UTF-8 becomes U+FFFD. Raises ValueError without a tokenizer."""
        tokenizer = self._require()
        return tokenizer.decode(list(token_ids), skip_special_tokens=not keep_special_tokens)

    def token_bytes(self, token_id: int) -> bytes | None:
        """What one token adds to a text, in UTF-8, maybe a part of a character; None where it has no text of its own:
        special tokens, ids beyond the tokenizer's length, all without a tokenizer."""
        if self._tokenizer is None or self._token_of(token_id) is None:
            return None
        if self._is_byte_level:
            return self._single_tokens.bytes_of(token_id)
        # The second of two: the first of a text may lose a leading space.
        text = self.decode([token_id, token_id])[len(self.decode([token_id])) :]
        return None if REPLACEMENT in text else text.encode()

    def token_name(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it, special ones by their names. None where there is none."""
        return None if self._tokenizer is None else self._tokenizer.id_to_token(token_id)

    def detokenizer(self) -> Detokenizer:
        """A new stream of text for one sequence, special tokens left away."""
        if self._tokenizer is None:
            return NoDetokenizer()
        if self._is_byte_level:
            return ByteLevelDetokenizer(self._token_of)
        return PrefixDetokenizer(self.decode)

    def _token_of(self, token_id: int) -> str | None:
        if self._tokenizer is None or token_id in self._ids_without_text:
            return None
        return self._tokenizer.id_to_token(token_id)

    def _require(self) -> tokenizers.Tokenizer:
        if self._tokenizer is None:
            raise ValueError(f"the model in {self._folder} has no tokenizer.json: text is not possible, only token ids")
        return self._tokenizer

    def _find_named_tokens(self) -> dict[str, str]:
        """Of tokenizer_config.json."""
        entries = _read_json(self._folder / "tokenizer_config.json").items()
        tokens = {name: entry.get("content") if isinstance(entry, dict) else entry for name, entry in entries}
        return {
            name: token
            for name, token in tokens.items()
            if name.endswith("_token") and isinstance(token, str) and token in self._special_ids
        }

    def _find_bos(self, named_tokens: Mapping[str, str]) -> int | None:
        """The id of tokenizer_config.json's bos_token, else config.json's bos_token_id."""
        if "bos_token" in named_tokens:
            return self._special_ids[named_tokens["bos_token"]]
        config = _read_json(self._folder / "config.json")
        text_config = config.get("text_config")
        token_id = text_config.get("bos_token_id") if isinstance(text_config, dict) else None
        token_id = config.get("bos_token_id") if token_id is None else token_id
        return token_id if isinstance(token_id, int) else None


def _load(path: Path) -> tokenizers.Tokenizer | None:
    if not path.exists():
        return None
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    return isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel)
