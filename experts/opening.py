"""How a lane opens: each end proves that it knows the cluster secret before the other believes a word of it.

    shard -> router   challenge   version, nonce
    router -> shard   answer      version, nonce, the shard it wants, its lane id, HMAC over all so far
    shard -> router   welcome     the terms of the lane, HMAC over all so far

The HMAC is SHA-256 under the cluster secret, over the transcript and a label, so neither end's proof serves as
the other's, and nothing recorded from one opening fits another. All messages have a fixed size.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass

from experts.message import MessageError

_CHALLENGE = struct.Struct("<4sI32s")
_ANSWER = struct.Struct("<4sI32s96s96s")
_WELCOME = struct.Struct("<4sIIII16s")
_MAGIC = b"ARO1"
_VERSION = 1
_MAC_BYTES = 32
_ID_BYTES = 96

NONCE_BYTES = 32
CHALLENGE_BYTES = _CHALLENGE.size
ANSWER_BYTES = _ANSWER.size + _MAC_BYTES
WELCOME_BYTES = _WELCOME.size + _MAC_BYTES


class OpeningError(MessageError):
    """The other end is not who it should be, or speaks another version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneTerms:
    """What the shard tells a router about their lane: its number, and what a row and a request may be.

    dtype is torch's name for it without the prefix, for example "bfloat16".
    """

    lane: int
    hidden_size: int
    dtype: str
    max_rows: int


def make_challenge(nonce: bytes) -> bytes:
    return _CHALLENGE.pack(_MAGIC, _VERSION, nonce)


def make_answer(challenge: bytes, *, secret: bytes, nonce: bytes, shard_id: str, lane_id: str) -> bytes:
    """Raises OpeningError if challenge is none, ValueError for ids longer than 96 bytes."""
    magic, version, _nonce = _CHALLENGE.unpack(challenge)
    _check_start(magic, version)
    body = _ANSWER.pack(_MAGIC, _VERSION, nonce, _padded("shard_id", shard_id), _padded("lane_id", lane_id))
    return body + _mac(secret, b"arriero router", challenge + body)


def check_answer(answer: bytes, *, challenge: bytes, secret: bytes, shard_id: str) -> str:
    """The router's lane id. Raises OpeningError if the proof is wrong or the router wants another shard."""
    body, mac = answer[: _ANSWER.size], answer[_ANSWER.size :]
    magic, version, _nonce, wanted, lane_id = _ANSWER.unpack(body)
    _check_start(magic, version)
    _check_mac(mac, _mac(secret, b"arriero router", challenge + body))
    if _text(wanted) != shard_id:
        raise OpeningError(f"the router wants shard {_text(wanted)!r}, this is {shard_id!r}")
    return _text(lane_id)


def make_welcome(terms: LaneTerms, *, challenge: bytes, answer: bytes, secret: bytes) -> bytes:
    body = _WELCOME.pack(_MAGIC, _VERSION, terms.lane, terms.hidden_size, terms.max_rows, terms.dtype.encode("ascii"))
    return body + _mac(secret, b"arriero shard", challenge + answer + body)


def check_welcome(welcome: bytes, *, challenge: bytes, answer: bytes, secret: bytes) -> LaneTerms:
    """Raises OpeningError if the shard's proof is wrong."""
    body, mac = welcome[: _WELCOME.size], welcome[_WELCOME.size :]
    magic, version, lane, hidden_size, max_rows, dtype = _WELCOME.unpack(body)
    _check_start(magic, version)
    _check_mac(mac, _mac(secret, b"arriero shard", challenge + answer + body))
    return LaneTerms(lane=lane, hidden_size=hidden_size, max_rows=max_rows, dtype=_text(dtype))


def _check_start(magic: bytes, version: int) -> None:
    if magic != _MAGIC:
        raise OpeningError(f"magic is {magic!r}, not {_MAGIC!r}")
    if version != _VERSION:
        raise OpeningError(f"version is {version}, this end speaks {_VERSION}")


def _mac(secret: bytes, label: bytes, transcript: bytes) -> bytes:
    return hmac.digest(secret, label + transcript, "sha256")


def _check_mac(found: bytes, wanted: bytes) -> None:
    if not hmac.compare_digest(found, wanted):
        raise OpeningError("the proof does not fit this cluster's secret")


def _padded(name: str, text: str) -> bytes:
    encoded = text.encode()
    if not 1 <= len(encoded) <= _ID_BYTES or b"\0" in encoded:
        raise ValueError(f"{name} must be 1 to {_ID_BYTES} bytes without NUL, got {text!r}")
    return encoded


def _text(padded: bytes) -> str:
    try:
        return padded.rstrip(b"\0").decode()
    except UnicodeDecodeError as error:
        raise OpeningError(f"an id is not UTF-8: {padded!r}") from error
