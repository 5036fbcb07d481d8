"""What is known of each shard, from its own answers and from those that failed. Pure: time comes in as an argument."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from cluster.control.epoch_view import ShardView
from cluster.control.membership import MemberState
from cluster.control.shard_fleet import ShardReport
from experts.epoch import ShardAddress
from experts.placement import ShardId

# How long a shard that must leave waits for the one in its place before others take over what it holds.
PATIENCE_S = 20.0


@dataclass(slots=True, kw_only=True)
class _Record:
    """address: None while it loads. epochs: those it serves, each with its weights version. seen_s: None before its
    first answer."""

    address: ShardAddress | None = None
    epochs: dict[int, int] = field(default_factory=dict)
    memory_pool: str = ""
    num_free_slots: int = 0
    num_loaded: int = 0
    leaving_since_s: float | None = None
    seen_s: float | None = None
    has_ended: bool = False
    rests_until_s: float = 0.0


class ShardRecords:
    """Shards by id. What comes of a shard that is not known, or has ended, changes nothing."""

    def __init__(self, *, suspect_after_s: float) -> None:
        self._suspect_after_s = suspect_after_s
        self._records: dict[ShardId, _Record] = {}
        self._draining_nodes: frozenset[str] = frozenset()

    def __contains__(self, shard_id: ShardId) -> bool:
        return shard_id in self._records

    def add(self, shard_id: ShardId, address: ShardAddress | None = None) -> None:
        """address: of one that has loaded before."""
        self._records[shard_id] = _Record(address=address)

    def drop(self, shard_id: ShardId) -> None:
        self._records.pop(shard_id, None)

    def address_of(self, shard_id: ShardId) -> ShardAddress | None:
        record = self._records.get(shard_id)
        return None if record is None else record.address

    def loading(self) -> tuple[ShardId, ...]:
        return tuple(shard for shard, each in self._records.items() if each.address is None and not each.has_ended)

    def up(self) -> tuple[ShardId, ...]:
        """Those that have loaded and, as far as is known, live."""
        return tuple(shard for shard, each in self._records.items() if each.address is not None and not each.has_ended)

    def note_up(self, shard_id: ShardId, address: ShardAddress) -> None:
        if (record := self._living(shard_id)) is not None:
            record.address = address

    def note_report(self, shard_id: ShardId, report: ShardReport, now_s: float) -> None:
        if (record := self._living(shard_id)) is not None:
            record.epochs = dict(report.epochs)
            record.memory_pool, record.num_free_slots = report.memory_pool, report.num_free_slots
            record.num_loaded = report.num_loaded
            record.seen_s = now_s
            must_leave = report.is_leaving or report.node_id in self._draining_nodes
            if not must_leave:
                record.leaving_since_s = None
            elif record.leaving_since_s is None:
                record.leaving_since_s = now_s

    def note_draining(self, node_ids: frozenset[str]) -> None:
        """Counts from a shard's next report on."""
        self._draining_nodes = node_ids

    def note_serves(self, shard_id: ShardId, number: int, weights_version: int) -> None:
        if (record := self._living(shard_id)) is not None:
            record.epochs[number] = weights_version

    def note_retired(self, shard_id: ShardId, number: int) -> None:
        if (record := self._living(shard_id)) is not None:
            record.epochs.pop(number, None)

    def note_death(self, shard_id: ShardId, *, rests_until_s: float = 0.0) -> bool:
        """Whether that is news."""
        record = self._living(shard_id)
        if record is None:
            return False
        record.has_ended, record.rests_until_s = True, rests_until_s
        return True

    def views(self, now_s: float, weights_version: int) -> dict[ShardId, ShardView]:
        """As epochs of this version see them."""
        return {shard_id: self._view(record, now_s, weights_version) for shard_id, record in self._records.items()}

    def strays(self, weights_versions: Collection[int]) -> Iterator[tuple[ShardId, int]]:
        """Epochs of other versions than these that a shard still serves."""
        for shard_id in self.up():
            for number, version in self._records[shard_id].epochs.items():
                if version not in weights_versions:
                    yield shard_id, number

    def _living(self, shard_id: ShardId) -> _Record | None:
        record = self._records.get(shard_id)
        return None if record is None or record.has_ended else record

    def _view(self, record: _Record, now_s: float, weights_version: int) -> ShardView:
        return ShardView(
            state=self._state(record, now_s),
            epochs=frozenset(number for number, version in record.epochs.items() if version == weights_version),
            memory_pool=record.memory_pool,
            num_free_slots=record.num_free_slots,
            seen_s=record.seen_s or 0.0,
            num_loaded=record.num_loaded,
            must_leave=record.leaving_since_s is not None,
            is_pressed=record.leaving_since_s is not None and now_s - record.leaving_since_s > PATIENCE_S,
            rests=now_s < record.rests_until_s,
        )

    def _state(self, record: _Record, now_s: float) -> MemberState:
        """One that has loaded under an earlier controller and has not answered this one yet is suspect: it may be
        as it was, and nothing is done about it."""
        if record.has_ended:
            return MemberState.DEAD
        if record.address is None:
            return MemberState.STARTING
        silent = record.seen_s is None or now_s - record.seen_s > self._suspect_after_s
        return MemberState.SUSPECT if silent else MemberState.READY
