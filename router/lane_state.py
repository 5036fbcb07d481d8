"""A router's place between two epochs as its replica knows it, and what the controller offers. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from router.messages import AbandonEpoch, AdoptEpoch, EpochPrepared, LanesChanged, PrepareEpoch


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneState:
    """epoch: the one the engine uses, None while it has not told. prepared: the one it could adopt at once, but for
    the shards in unreachable. lost: shards that it does without in its epoch. Both come with reasons."""

    epoch: int | None = None
    prepared: int | None = None
    unreachable: Mapping[str, str] = field(default_factory=dict)
    lost: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For the report to the controller."""
        return asdict(self)

    def without(self, number: int) -> LaneState:
        """The preparation of this epoch was for nothing."""
        return replace(self, prepared=None, unreachable={}) if self.prepared == number else self

    def after(self, message: EpochPrepared | LanesChanged) -> LaneState:
        match message:
            case EpochPrepared(number=number, unreachable=unreachable):
                return replace(self, prepared=number, unreachable=unreachable)
            case LanesChanged(epoch=epoch, lost=lost) if self.prepared is not None and self.prepared <= epoch:
                return LaneState(epoch=epoch, lost=lost)
            case LanesChanged(epoch=epoch, lost=lost):
                return replace(self, epoch=epoch, lost=lost)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochOffer:
    """What the controller answers to a report: the number in force, and the epoch to prepare for, as a plain dict,
    where the router has not said that it is prepared."""

    in_force: int
    prepare: Mapping[str, Any] | None
    preparing: int | None


def next_messages(lanes: LaneState, offer: EpochOffer) -> Iterator[PrepareEpoch | AdoptEpoch | AbandonEpoch]:
    """What an engine in this state is to be told."""
    if lanes.prepared is not None and lanes.prepared not in (offer.in_force, offer.preparing):
        yield AbandonEpoch(number=lanes.prepared)
    elif lanes.prepared == offer.in_force:
        yield AdoptEpoch(number=offer.in_force)
    if offer.prepare is not None:
        yield PrepareEpoch(epoch=dict(offer.prepare))
