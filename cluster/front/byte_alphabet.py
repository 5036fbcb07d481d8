"""The characters that stand for bytes in byte-level vocabularies (GPT-2's choice, which Llama 4 keeps).

Printable Latin-1 bytes stand for themselves; the others take the characters from U+0100 on, in order.
"""

from __future__ import annotations

NUM_BYTES = 256


def byte_characters() -> tuple[str, ...]:
    """The character of each byte, by byte."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    return tuple(chr(byte) if byte in printable else chr(NUM_BYTES + others.index(byte)) for byte in range(NUM_BYTES))
