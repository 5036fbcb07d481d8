"""Text of a model for a terminal, which should not obey it."""

from __future__ import annotations

LAYOUT = "\n\t"


def printable(text: str) -> str:
    """text with a middle dot for each character that is neither printable nor layout: no escape sequence survives."""
    return "".join(
        character if character.isprintable() or character in LAYOUT else "\N{MIDDLE DOT}" for character in text
    )
