"""What a controller must remember to be reborn, kept outside of it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from cluster.metrics.snapshot import Snapshot
from experts.placement import ExpertPlacement, ShardId, Slot

NUM_SECRET_BYTES = 32


class OtherWeights(msgspec.Struct, frozen=True, kw_only=True):
    """A version of the weights beside the one that is served: the next one, or the one before until its last request
    has ended. model, epoch and preparing as in DesiredState; epoch is None before its first."""

    weights_version: int
    model: str
    epoch: dict[str, Any] | None = None
    preparing: dict[str, Any] | None = None


class WeightUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """The last update that was asked for, under way or over. state: an update_plan.UpdateState. reason: why it was
    given up."""

    update_id: str
    model: str
    weights_version: int
    state: str
    reason: str = ""


class DesiredState(msgspec.Struct, frozen=True, kw_only=True):
    """config is ServiceConfig as a plain dict. epoch is the one in force, preparing the one that may follow it, both
    experts.epoch.Epoch as a plain dict; epoch is None before the first.

    term grows with every start of a controller; last_epoch is the highest number ever given to an epoch. secret
    opens lanes and token links. shard_ids names every shard that may exist, before it is created, so that none can be
    lost; target is what each should hold, (layer, expert) by shard, once all is well. least_shards: how many an
    operator has asked for since the start, below which no load takes them; None: what the config says. departed: what
    members counted that are gone, for metrics that must never go back.

    weights_version is the one that new requests get; model is whose weights it is, where an update has put it in the
    place of config's. last_version is the highest ever given to weights.
    """

    config: dict[str, Any]
    secret: bytes
    admin_token: str
    started_at: float
    term: int = 1
    last_epoch: int = 0
    shard_ids: tuple[str, ...] = ()
    target: dict[str, list[tuple[int, int]]] = {}
    least_shards: int | None = None
    epoch: dict[str, Any] | None = None
    preparing: dict[str, Any] | None = None
    departed: Snapshot = msgspec.field(default_factory=Snapshot)
    weights_version: int = 1
    last_version: int = 1
    model: str | None = None
    other: OtherWeights | None = None
    update: WeightUpdate | None = None


class Store(Protocol):
    """Keeps one service's state where the controller's death does not reach it."""

    async def load(self) -> DesiredState | None: ...

    async def save(self, state: DesiredState) -> None: ...

    async def delete(self) -> None: ...


class Memory:
    """The state at hand; every change is in the store before it is here."""

    def __init__(self, store: Store, state: DesiredState) -> None:
        self._store = store
        self._changing = asyncio.Lock()
        self.state = state

    @classmethod
    async def open(cls, store: Store, config: dict[str, Any]) -> Memory:
        """A new term of the service that the store knows, or the first of a new one with this config."""
        known = await store.load()
        memory = cls(store, _first_state(config) if known is None else known)
        await memory.change(term=memory.state.term + (known is not None))
        return memory

    async def change(self, **fields: Any) -> None:
        await self.update(lambda _: fields)

    async def update(self, change: Callable[[DesiredState], Mapping[str, Any]]) -> None:
        """change makes new values from those before; no other change comes in between."""
        async with self._changing:
            state = msgspec.structs.replace(self.state, **change(self.state))
            await self._store.save(state)
            self.state = state

    async def erase(self) -> None:
        await self._store.delete()


def _first_state(config: dict[str, Any]) -> DesiredState:
    return DesiredState(
        config=config,
        secret=secrets.token_bytes(NUM_SECRET_BYTES),
        admin_token=secrets.token_urlsafe(NUM_SECRET_BYTES),
        started_at=time.time(),
    )


def encode_state(state: DesiredState) -> bytes:
    return msgspec.msgpack.encode(state)


def decode_state(data: bytes) -> DesiredState:
    """Raises msgspec.ValidationError for what another version has written."""
    return msgspec.msgpack.decode(data, type=DesiredState)


def target_of(plain: Mapping[str, Any]) -> ExpertPlacement:
    """From DesiredState.target."""
    return ExpertPlacement(
        slots_by_shard={ShardId(shard): tuple(Slot(*slot) for slot in slots) for shard, slots in plain.items()}
    )
