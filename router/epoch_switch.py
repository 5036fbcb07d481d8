"""How a router goes from one epoch to the next: links are opened in the background, and taken over between two steps.

prepare --> connecting, a thread per new link --> prepared --> adopt
                 |                                   |
                 +------------ abandon --------------+
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from experts.epoch import Epoch, ShardAddress
from experts.lane import not_connected
from experts.placement import ShardId
from experts.transport.base import Link, LinkError

logger = logging.getLogger(__name__)

OnPrepared = Callable[[int, Mapping[ShardId, str]], None]
"""Hears the epoch's number and the shards that cannot be reached, with reasons; from another thread."""


class Lanes(Protocol):
    """What a switch needs of experts.lane.LaneDispatcher."""

    lost: dict[ShardId, str]

    @property
    def epoch(self) -> int: ...

    def lacks(self, epoch: Epoch) -> tuple[ShardId, ...]: ...

    def connect(self, address: ShardAddress) -> Link: ...

    def adopt(self, epoch: Epoch, opened: Mapping[ShardId, Link], failed: Mapping[ShardId, str]) -> None: ...


class EpochSwitch:
    """Belongs to the engine's thread; only connections are made in others, and on_prepared is called there."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._preparation: _Preparation | None = None

    @property
    def epoch(self) -> int:
        """The one in use."""
        return self._lanes.epoch

    @property
    def lost(self) -> dict[str, str]:
        """Shards that are given up in it, and why."""
        return {str(shard_id): reason for shard_id, reason in self._lanes.lost.items()}

    def prepare(self, epoch: Epoch, on_prepared: OnPrepared) -> None:
        """Begins to open the links that the epoch needs; that of another epoch ends. Idempotent.

        An epoch that is not above the one in use is none to go to, and is not answered.
        """
        if epoch.number <= self.epoch:
            return
        if self._preparation is not None:
            if self._preparation.epoch.number == epoch.number:
                return
            self.abandon(self._preparation.epoch.number)
        self._preparation = _Preparation(epoch, self._lanes, on_prepared)

    def adopt(self, number: int) -> bool:
        """Whether the router uses the epoch from now on and did not before: it must have been prepared."""
        preparation = self._preparation
        if preparation is None or preparation.epoch.number != number or not preparation.is_done:
            return False
        self._preparation = None
        self._lanes.adopt(preparation.epoch, preparation.opened, preparation.failed)
        logger.info("epoch %d: adopted; lost: %s", number, self.lost or "none")
        return True

    def abandon(self, number: int) -> None:
        """Closes what was opened for the epoch. One that is not being prepared is no error."""
        if self._preparation is not None and self._preparation.epoch.number == number:
            self._preparation.end()
            self._preparation = None

    def close(self) -> None:
        if self._preparation is not None:
            self.abandon(self._preparation.epoch.number)


class _Preparation:
    """opened and failed may be read once it is done."""

    def __init__(self, epoch: Epoch, lanes: Lanes, on_prepared: OnPrepared) -> None:
        self.epoch = epoch
        self.opened: dict[ShardId, Link] = {}
        self.failed: dict[ShardId, str] = {}
        self._on_prepared = on_prepared
        self._lock = threading.Lock()
        self._has_ended = False
        lacking = lanes.lacks(epoch)
        self._num_missing = len(lacking)
        for shard_id in lacking:
            address = epoch.address_of(shard_id)
            threading.Thread(
                target=self._connect, args=(lanes, address), name=f"connect {shard_id}", daemon=True
            ).start()
        if not lacking:
            on_prepared(epoch.number, {})

    @property
    def is_done(self) -> bool:
        return self._num_missing == 0

    def end(self) -> None:
        """Nobody will adopt the epoch: links are closed, those that still come, too."""
        with self._lock:
            self._has_ended = True
            for link in self.opened.values():
                link.close()

    def _connect(self, lanes: Lanes, address: ShardAddress) -> None:
        result: Link | str
        try:
            result = lanes.connect(address)
        except LinkError as error:
            result = not_connected(address, error)
        with self._lock:
            self._take(address.shard_id, result)
            is_prepared = self.is_done and not self._has_ended
        if is_prepared:
            self._on_prepared(self.epoch.number, self.failed)

    def _take(self, shard_id: ShardId, result: Link | str) -> None:
        if isinstance(result, str):
            self.failed[shard_id] = result
        elif self._has_ended:
            result.close()
        else:
            self.opened[shard_id] = result
        # Last: whoever reads the two without the lock looks at this first.
        self._num_missing -= 1
