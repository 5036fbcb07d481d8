"""A shard: the expert weights of one process, of one version of the model or of two, and the epochs under which it
computes with them.

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
from experts.placement import ShardId, Slot, WeightSlot
from experts.served_epochs import ServedEpochs


class Shard:
    """Computes experts. Serves two epochs of each weights version at most and refuses every other; it never repairs.

    Epochs may be changed by other threads than the one that computes: tables are replaced whole, and weights that
    no epoch needs any more go only when the computing thread says that none of their rows wait.
    """

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
        """Every expert maps [R, hidden_size] to the same shape in dtype on device. weights_version: of these slots;
        others come with an epoch."""
        self.shard_id = shard_id
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.device = torch.device(device)
        self.load = ExpertLoad(slots)
        self._weights_version = weights_version
        self._slots = {WeightSlot(weights_version, *slot): expert for slot, expert in slots.items()}
        self._retired: frozenset[WeightSlot] = frozenset()
        self._epochs = ServedEpochs()
        self._changing = threading.Lock()

    @property
    def slots(self) -> tuple[WeightSlot, ...]:
        """Those it holds for good: what waits to be freed does not count."""
        return tuple(sorted(self._slots.keys() - self._retired))

    @property
    def experts(self) -> tuple[Expert, ...]:
        return tuple(self._slots.values())

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs served now, in the order in which they came."""
        return self._epochs.numbers

    @property
    def weights_versions(self) -> dict[int, int]:
        """Of each epoch served now."""
        return self._epochs.versions

    @property
    def num_bytes(self) -> int:
        return sum(expert.num_bytes for expert in self._slots.values())

    def lacks(self, epoch: Epoch) -> list[Slot]:
        """What the epoch places here and is not loaded in its version, sorted."""
        return sorted(each.slot for each in self._placed(epoch) - (self._slots.keys() - self._retired))

    def serve_epoch(self, epoch: Epoch, loaded: Mapping[Slot, Expert] | None = None) -> None:
        """Serves the epoch from now on, with these further slots, which are of its weights version. Idempotent.

        Raises ValueError as ``ServedEpochs.added`` does, or if a slot that the epoch places here is not loaded.
        """
        with self._changing:
            further = {WeightSlot(epoch.weights_version, *slot): expert for slot, expert in (loaded or {}).items()}
            slots = {**self._slots, **further}
            mine = self._placed(epoch)
            epochs = self._epochs.added(epoch.number, epoch.weights_version, mine)
            missing = mine - (slots.keys() - self._retired) - further.keys()
            if missing:
                lacking = sorted(each.slot for each in missing)
                raise ValueError(
                    f"epoch {epoch.number} places slots of weights version {epoch.weights_version} that "
                    f"{self.shard_id} lacks: {lacking}"
                )
            self.load.add_slots(each.slot for each in slots)
            self._slots = slots
            self._retired -= mine
            self._epochs = epochs

    def _placed(self, epoch: Epoch) -> frozenset[WeightSlot]:
        slots = epoch.placement.slots_by_shard.get(self.shard_id, ())
        return frozenset(WeightSlot(epoch.weights_version, *slot) for slot in slots)

    def retire_epoch(self, number: int) -> None:
        """Refuses the epoch from now on; slots that no other one needs are to be freed. Idempotent.

        With the last epoch no slot goes: a shard that was forgotten while it slept keeps its weights for the next.
        """
        with self._changing:
            self._epochs = self._epochs.without(number)
            if self._epochs.numbers:
                self._retired = frozenset(self._slots.keys() - self._epochs.slots)

    @property
    def has_retired(self) -> bool:
        """Whether ``free_retired`` might have something to do."""
        return bool(self._retired)

    def free_retired(self, *, in_use: Collection[WeightSlot]) -> None:
        """Drops the weights of retired slots but for those whose rows still wait. For the computing thread."""
        with self._changing:
            freed = self._retired - frozenset(in_use)
            self._slots = {slot: mlp for slot, mlp in self._slots.items() if slot not in freed}
            self._retired -= freed

    def refusal(self, *, epoch: int, weights_version: int, slots: Iterable[tuple[int, int]]) -> Refusal | None:
        """Why a request must be refused; None when it may be computed."""
        served = self._epochs.get(epoch)
        if served is None:
            return Refusal.STALE_EPOCH
        if weights_version != served.weights_version:
            return Refusal.OTHER_WEIGHTS_VERSION
        wanted = (WeightSlot(weights_version, *slot) for slot in slots)
        return None if served.slots.issuperset(wanted) else Refusal.NO_SUCH_SLOT

    def apply_expert(self, slot: WeightSlot, x_RD: torch.Tensor) -> torch.Tensor:
        """The expert's output for already scaled rows [R, D] on this shard's device; R may be 0.

        Raises ValueError when the slot is not loaded.
        """
        return self._expert(slot, x_RD.shape[0])(x_RD)

    def apply(self, layer: int, x_RD: torch.Tensor, rows_per_expert: Sequence[tuple[int, int]]) -> torch.Tensor:
        """y_RD for rows grouped by expert: rows_per_expert lists ``(expert, number of rows)`` in row order. With the
        slots that the shard was made with.

        Raises ValueError when the counts do not add up to R or a slot is not loaded.
        """
        counts = [rows for _expert, rows in rows_per_expert]
        if sum(counts) != x_RD.shape[0]:
            raise ValueError(f"rows_per_expert adds up to {sum(counts)}, x_RD has {x_RD.shape[0]} rows")
        version = self._weights_version
        experts = [self._expert(WeightSlot(version, layer, expert), rows) for expert, rows in rows_per_expert]
        return apply_experts(experts, x_RD, counts)

    def _expert(self, slot: WeightSlot, num_rows: int) -> Expert:
        """Counts the rows that it is about to get."""
        if slot not in self._slots:
            name = f"{slot.slot} of weights version {slot.weights_version}"
            raise ValueError(f"{name} is not loaded on {self.shard_id}")
        self.load.add(slot.slot, num_rows)
        return self._slots[slot]
