"""The epochs that a shard serves: at most two of each weights version, each with the slots that it places there."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from experts.placement import WeightSlot

MAX_EPOCHS_PER_VERSION = 2


class ServedEpoch(NamedTuple):
    weights_version: int
    slots: frozenset[WeightSlot]


class ServedEpochs:
    """Never changes; a change makes another one, so that whoever reads needs no lock."""

    def __init__(self, epochs: Mapping[int, ServedEpoch] = MappingProxyType({})) -> None:
        self._epochs = dict(epochs)

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(self._epochs)

    @property
    def versions(self) -> dict[int, int]:
        """The weights version of each epoch."""
        return {number: served.weights_version for number, served in self._epochs.items()}

    @property
    def slots(self) -> frozenset[WeightSlot]:
        """What any of them needs."""
        return frozenset[WeightSlot]().union(*(served.slots for served in self._epochs.values()))

    def get(self, number: int) -> ServedEpoch | None:
        return self._epochs.get(number)

    def added(self, number: int, weights_version: int, slots: frozenset[WeightSlot]) -> ServedEpochs:
        """Raises ValueError if the number is below the newest served one of this version, was another version's, or
        comes beside MAX_EPOCHS_PER_VERSION others of it."""
        known = self._epochs.get(number)
        if known is not None and known.weights_version != weights_version:
            raise ValueError(f"epoch {number} is of weights version {known.weights_version}, not {weights_version}")
        alike = [each for each, served in self._epochs.items() if served.weights_version == weights_version]
        if alike and number < max(alike):
            raise ValueError(f"epoch {number} is older than the served epoch {max(alike)}")
        if len({*alike} - {number}) >= MAX_EPOCHS_PER_VERSION:
            raise ValueError(f"epoch {number} would be one too many beside {alike}")
        return ServedEpochs({**self._epochs, number: ServedEpoch(weights_version, slots)})

    def without(self, number: int) -> ServedEpochs:
        return ServedEpochs({each: served for each, served in self._epochs.items() if each != number})
