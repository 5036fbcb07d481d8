"""Server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

DONE = b"data: [DONE]\n\n"


def event(payload: bytes) -> bytes:
    """payload: JSON, which never holds a bare line break."""
    return b"data: %b\n\n" % payload
