"""What a controller must remember to be reborn: kept outside of it, in Ray's key-value store."""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

NUM_SECRET_BYTES = 32


class DesiredState(msgspec.Struct, frozen=True, kw_only=True):
    """config is ServiceConfig as a plain dict; epoch is experts.epoch.Epoch as a plain dict, None before the first.

    term grows with every start of a controller; last_epoch is the highest number ever given to an epoch. secret
    opens lanes and token links; shards are named before they are created, so that none can be lost.
    """

    config: dict[str, Any]
    secret: bytes
    admin_token: str
    started_at: float
    term: int = 1
    last_epoch: int = 0
    shard_ids: tuple[str, ...] = ()
    epoch: dict[str, Any] | None = None

    def next_term(self) -> DesiredState:
        return msgspec.structs.replace(self, term=self.term + 1)


def first_state(config: dict[str, Any], now_s: float) -> DesiredState:
    return DesiredState(
        config=config,
        secret=secrets.token_bytes(NUM_SECRET_BYTES),
        admin_token=secrets.token_urlsafe(NUM_SECRET_BYTES),
        started_at=now_s,
    )


def encode_state(state: DesiredState) -> bytes:
    return msgspec.msgpack.encode(state)


def decode_state(data: bytes) -> DesiredState:
    """Raises msgspec.ValidationError for what another version has written."""
    return msgspec.msgpack.decode(data, type=DesiredState)
