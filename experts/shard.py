"""A shard: the expert weights of one process, and the epochs under which it computes with them.

Shapes: R routed rows, D model.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch

from experts.epoch import Epoch
from experts.load import ExpertLoad
from experts.message import Refusal
from experts.mlp import Expert, apply_experts
from experts.placement import ShardId, Slot


class Shard:
    """Computes experts. Serves at most MAX_EPOCHS epochs and refuses every other; it never repairs.

    Epochs may be changed by other threads than the one that computes: tables are replaced whole, and weights that
    no epoch needs any more go only when the computing thread says that none of their rows wait.
    """

    MAX_EPOCHS = 2

    def __init__(
        self,
        *,
        shard_id: ShardId,
        slots: Mapping[Slot, Expert],
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        weights_version: int = 0,
    ) -> None:
        """Every expert maps [R, hidden_size] to the same shape in dtype on device."""
        self.shard_id = shard_id
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.device = torch.device(device)
        self.weights_version = weights_version
        self.load = ExpertLoad(slots)
        self._slots = dict(slots)
        self._retired: frozenset[Slot] = frozenset()
        self._epochs: dict[int, frozenset[Slot]] = {}
        self._changing = threading.Lock()

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Those it holds for good: what waits to be freed does not count."""
        return tuple(sorted(self._slots.keys() - self._retired))

    @property
    def experts(self) -> tuple[Expert, ...]:
        return tuple(self._slots.values())

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs served now, oldest first."""
        return tuple(self._epochs)

    @property
    def num_bytes(self) -> int:
        return sum(expert.num_bytes for expert in self._slots.values())

    def serve_epoch(self, epoch: Epoch, loaded: Mapping[Slot, Expert] | None = None) -> None:
        """Serves the epoch from now on, with these further slots. Idempotent.

        Raises ValueError if the number is below the newest served one, if MAX_EPOCHS others are served, or if the
        weights version or a slot that the epoch places here is not loaded.
        """
        with self._changing:
            slots = {**self._slots, **(loaded or {})}
            mine = frozenset(epoch.placement.slots_by_shard.get(self.shard_id, ()))
            self._check(epoch, missing=mine - (slots.keys() - self._retired) - (loaded or {}).keys())
            self.load.add_slots(slots)
            self._slots = slots
            self._retired -= mine
            self._epochs = {**self._epochs, epoch.number: mine}

    def _check(self, epoch: Epoch, *, missing: Collection[Slot]) -> None:
        if self._epochs and epoch.number < max(self._epochs):
            raise ValueError(f"epoch {epoch.number} is older than the served epoch {max(self._epochs)}")
        if len(self._epochs.keys() - {epoch.number}) >= self.MAX_EPOCHS:
            raise ValueError(f"epoch {epoch.number} would be one too many beside {list(self._epochs)}")
        if epoch.weights_version != self.weights_version:
            raise ValueError(f"weights_version {epoch.weights_version} is not the loaded {self.weights_version}")
        if missing:
            raise ValueError(f"epoch {epoch.number} places slots that {self.shard_id} lacks: {sorted(missing)}")

    def retire_epoch(self, number: int) -> None:
        """Refuses the epoch from now on; slots that no other one needs are to be freed. Idempotent.

        With the last epoch no slot goes: a shard that was forgotten while it slept keeps its weights for the next.
        """
        with self._changing:
            self._epochs = {served: slots for served, slots in self._epochs.items() if served != number}
            if self._epochs:
                self._retired = frozenset(self._slots.keys() - frozenset().union(*self._epochs.values()))

    @property
    def has_retired(self) -> bool:
        """Whether ``free_retired`` might have something to do."""
        return bool(self._retired)

    def free_retired(self, *, in_use: Collection[Slot]) -> None:
        """Drops the weights of retired slots but for those whose rows still wait. For the computing thread."""
        with self._changing:
            freed = self._retired - frozenset(in_use)
            self._slots = {slot: mlp for slot, mlp in self._slots.items() if slot not in freed}
            self._retired -= freed

    def refusal(self, *, epoch: int, weights_version: int, slots: Iterable[tuple[int, int]]) -> Refusal | None:
        """Why a request must be refused; None when it may be computed."""
        placed = self._epochs.get(epoch)
        if placed is None:
            return Refusal.STALE_EPOCH
        if weights_version != self.weights_version:
            return Refusal.OTHER_WEIGHTS_VERSION
        return None if placed.issuperset(slots) else Refusal.NO_SUCH_SLOT

    def apply_expert(self, slot: Slot, x_RD: torch.Tensor) -> torch.Tensor:
        """The expert's output for already scaled rows [R, D] on this shard's device; R may be 0.

        Raises ValueError when the slot is not loaded.
        """
        return self._expert(slot, x_RD.shape[0])(x_RD)

    def apply(self, layer: int, x_RD: torch.Tensor, rows_per_expert: Sequence[tuple[int, int]]) -> torch.Tensor:
        """y_RD for rows grouped by expert: rows_per_expert lists ``(expert, number of rows)`` in row order.

        Raises ValueError when the counts do not add up to R or a slot is not loaded.
        """
        counts = [rows for _expert, rows in rows_per_expert]
        if sum(counts) != x_RD.shape[0]:
            raise ValueError(f"rows_per_expert adds up to {sum(counts)}, x_RD has {x_RD.shape[0]} rows")
        experts = [self._expert(Slot(layer, expert), rows) for expert, rows in rows_per_expert]
        return apply_experts(experts, x_RD, counts)

    def _expert(self, slot: Slot, num_rows: int) -> Expert:
        """Counts the rows that it is about to get."""
        if slot not in self._slots:
            raise ValueError(f"slot {slot} is not loaded on {self.shard_id}")
        self.load.add(slot, num_rows)
        return self._slots[slot]
