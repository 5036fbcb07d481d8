"""The one decision between our own chat format and an operator's template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from cluster.front.chat import ChatMessage, encode_chat
from cluster.front.jinja_chat import JinjaChat
from cluster.front.tokenizer import Tokenizer

EncodeChat = Callable[[Sequence[ChatMessage]], list[int]]


def chat_encoder(tokenizer: Tokenizer, template: str | None) -> EncodeChat:
    """template: the path of a Jinja file; None for Llama 4's format. Raises OSError and ValueError as JinjaChat."""
    return partial(encode_chat, tokenizer) if template is None else JinjaChat(template, tokenizer).encode
