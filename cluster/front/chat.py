"""Chat messages to token ids, in Llama 4's format.

    <|begin_of_text|> then, per message,
    <|header_start|>{role}<|header_end|>\\n\\n{content}<|eot|>
    and at the end the header of the answer to come.

Rendered in ids, not in text: what a user writes can never become a special token, and the begin-of-text
token comes once. Checkpoints' own Jinja templates do neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Clients use the messages without a tokenizer.
    from cluster.front.tokenizer import Tokenizer

# The header's name of each role that callers may use.
HEADER_OF_ROLE = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "ipython",
    "ipython": "ipython",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePart:
    """An image: the bytes of an encoded file, or where it is."""

    data: bytes = b""
    url: str = ""


ContentPart = TextPart | ImagePart


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One turn. role is a key of HEADER_OF_ROLE; encode_chat checks it."""

    role: str
    content: tuple[ContentPart, ...]

    @classmethod
    def of_text(cls, role: str, text: str) -> ChatMessage:
        return cls(role=role, content=(TextPart(text=text),))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Specials:
    begin_of_text: int
    header_start: int
    header_end: int
    end_of_turn: int


def encode_chat(tokenizer: Tokenizer, messages: Sequence[ChatMessage]) -> list[int]:
    """The prompt for the assistant's next message.

    Raises ValueError naming the message and what is wrong with it, or why this tokenizer cannot chat.
    """
    if not messages:
        raise ValueError("messages must not be empty")
    specials = _specials_of(tokenizer)
    token_ids = [specials.begin_of_text]
    for index, message in enumerate(messages):
        token_ids += _encode_header(tokenizer, specials, _header_name(message.role, index))
        token_ids += tokenizer.encode(_text_of(message, index))
        token_ids.append(specials.end_of_turn)
    return token_ids + _encode_header(tokenizer, specials, "assistant")


def _specials_of(tokenizer: Tokenizer) -> _Specials:
    names = {
        "begin_of_text": "<|begin_of_text|>",
        "header_start": "<|header_start|>",
        "header_end": "<|header_end|>",
        "end_of_turn": "<|eot|>",
    }
    found = {field: tokenizer.special_token_id(name) for field, name in names.items()}
    ids = {field: token_id for field, token_id in found.items() if token_id is not None}
    if len(ids) < len(names):
        missing = ", ".join(name for field, name in names.items() if field not in ids)
        raise ValueError(
            f"chat is not possible with this model: its tokenizer lacks Llama 4's special tokens {missing}; "
            "send text or token ids"
        )
    return _Specials(**ids)


def _encode_header(tokenizer: Tokenizer, specials: _Specials, name: str) -> list[int]:
    # The blank line is encoded by itself, as in Meta's code: a newline that opens the content must not
    # change the header's tokens.
    blank_line = tokenizer.encode("\n\n")
    return [specials.header_start, *tokenizer.encode(name), specials.header_end, *blank_line]


def _header_name(role: str, index: int) -> str:
    if role not in HEADER_OF_ROLE:
        raise ValueError(f"messages[{index}].role must be one of {', '.join(HEADER_OF_ROLE)}, not {role!r}")
    return HEADER_OF_ROLE[role]


def _text_of(message: ChatMessage, index: int) -> str:
    """The joined text; a system message is trimmed, as the model was trained with."""
    texts = []
    for position, part in enumerate(message.content):
        if not isinstance(part, TextPart):
            raise ValueError(f"messages[{index}].content[{position}] is an image: images are not supported, only text")
        texts.append(part.text)
    text = "".join(texts)
    return text.strip() if message.role == "system" else text
