"""Chat messages to token ids, in Llama 4's format.

    <|begin_of_text|> then, per message,
    <|header_start|>{role}<|header_end|>\\n\\n{content}<|eot|>
    and at the end the header of the answer to come.

A message that does not end a turn, a tool's or the call of one, ends with <|eom|> instead, as in Meta's own code; the
published template has <|eot|> everywhere.

Rendered in ids, not in text: what a user writes can never become a special token, and the begin-of-text
token comes once. Checkpoints' own Jinja templates do neither. An operator's: cluster/front/jinja_chat.py.
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

ASSISTANT = "assistant"
TOOL_HEADER = "ipython"
# Either ends the assistant's turn, whatever the checkpoint says: models use both.
TURN_ENDS = ("<|eom|>", "<|eot|>")


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
    end_of_message: int
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
        check_role(message.role, index)
        token_ids += _encode_header(tokenizer, specials, HEADER_OF_ROLE[message.role])
        token_ids += tokenizer.encode(_content_of(message, index))
        token_ids.append(specials.end_of_turn if _ends_turn(messages, index) else specials.end_of_message)
    return token_ids + _encode_header(tokenizer, specials, ASSISTANT)


def turn_end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Of TURN_ENDS, those that the tokenizer has."""
    special_tokens = tokenizer.special_tokens
    return tuple(special_tokens[name] for name in TURN_ENDS if name in special_tokens)


def check_role(role: str, index: int) -> None:
    """Raises ValueError for a role that is none, of the message at index."""
    if role not in HEADER_OF_ROLE:
        raise ValueError(f"messages[{index}].role must be one of {', '.join(HEADER_OF_ROLE)}, not {role!r}")


def text_of(message: ChatMessage, index: int) -> str:
    """The joined text of a message's parts. Raises ValueError for an image, naming its place."""
    texts = []
    for position, part in enumerate(message.content):
        if not isinstance(part, TextPart):
            raise ValueError(f"messages[{index}].content[{position}] is an image: images are not supported, only text")
        texts.append(part.text)
    return "".join(texts)


def _ends_turn(messages: Sequence[ChatMessage], index: int) -> bool:
    """A tool's message does not, nor does the assistant's that a tool answers."""
    headers = [HEADER_OF_ROLE.get(message.role) for message in messages[index : index + 2]]
    return headers[0] != TOOL_HEADER and headers != [ASSISTANT, TOOL_HEADER]


def _specials_of(tokenizer: Tokenizer) -> _Specials:
    names = {
        "begin_of_text": "<|begin_of_text|>",
        "header_start": "<|header_start|>",
        "header_end": "<|header_end|>",
        "end_of_message": "<|eom|>",
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


def _content_of(message: ChatMessage, index: int) -> str:
    """A system message is trimmed, as the model was trained with."""
    text = text_of(message, index)
    return text.strip() if message.role == "system" else text
