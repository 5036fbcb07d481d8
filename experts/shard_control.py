"""What the controller may ask of a running shard: to prepare an epoch and to retire one, while rows are computed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from experts.epoch import Epoch
from experts.mlp import Mlp
from experts.placement import Slot
from experts.progress import Progress
from experts.shard import Shard

# Of the thread that loads, in the units of nice(1): rows that wait come first.
_LOADING_NICENESS = 10

SlotLoader = Callable[[Sequence[Slot], Progress, str | None], Mapping[Slot, Mlp]]
"""Loads these slots of this model, telling after each how far it has come; stops where that raises."""


class StaleTermError(ValueError):
    """The call comes from a controller that another one has succeeded."""


class PreparationEndedError(RuntimeError):
    """The epoch was retired while it was being prepared."""


class ShardControl:
    """Calls may come from several threads; preparations wait for one another."""

    def __init__(self, shard: Shard, load: SlotLoader) -> None:
        self._shard = shard
        self._load = load
        self._term = 0
        self._ended: set[int] = set()
        self._num_loaded = 0
        self._lock = threading.Lock()
        self._preparing = threading.Lock()

    @property
    def num_loaded(self) -> int:
        """Slots loaded for epochs since the start, those of a preparation under way included."""
        return self._num_loaded

    def prepare(self, term: int, epoch: Epoch, model: str | None = None) -> None:
        """Loads what the epoch places here and is not here yet, then serves it, beside the one in force. Idempotent.
        model: whose weights the epoch's version is, where it is not the one that the shard was made with.

        Raises StaleTermError, PreparationEndedError, ValueError as ``Shard.serve_epoch`` does, and whatever keeps
        a slot from being loaded; the shard is then as it was.
        """
        self._check_term(term)
        with self._preparing:
            self._check_not_ended(epoch.number)
            missing = self._shard.lacks(epoch)
            loaded = self._load_in_background(missing, epoch.number, model) if missing else {}
            with self._lock:
                self._check_not_ended(epoch.number)
                self._shard.serve_epoch(epoch, loaded)

    def retire(self, term: int, number: int) -> None:
        """Refuses the epoch from now on, and frees what only it needed; a preparation of it ends. Idempotent.

        Raises StaleTermError.
        """
        self._check_term(term)
        with self._lock:
            self._ended.add(number)
            self._shard.retire_epoch(number)

    def _check_term(self, term: int) -> None:
        with self._lock:
            if term < self._term:
                raise StaleTermError(f"term {term} is over: {self._shard.shard_id} has heard of term {self._term}")
            self._term = term

    def _check_not_ended(self, number: int) -> None:
        if number in self._ended:
            raise PreparationEndedError(f"epoch {number} was retired while {self._shard.shard_id} prepared it")

    def _load_in_background(self, slots: Sequence[Slot], number: int, model: str | None) -> Mapping[Slot, Mlp]:
        """In a thread of its own, whose priority is the kernel's business alone."""
        result: Future[Mapping[Slot, Mlp]] = Future()

        def progress(_done: int, _total: int) -> None:
            self._num_loaded += 1
            self._check_not_ended(number)

        def run() -> None:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOADING_NICENESS)
            try:
                result.set_result(self._load(slots, progress, model))
            except Exception as error:  # noqa: BLE001 handed to the caller
                result.set_exception(error)

        threading.Thread(target=run, name=f"prepare epoch {number}", daemon=True).start()
        return result.result()
