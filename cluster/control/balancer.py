"""What the controller knows of its shards' work, and what it would move. Pure: time comes in as an argument."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from cluster.balance.busy_fraction import BusyFraction
from cluster.balance.expert_traffic import ExpertTraffic
from cluster.balance.fleet import Fleet, ShardResources
from cluster.balance.load_window import LoadWindow
from cluster.balance.plan import Plan, Prediction, Refusal, RefusalReason
from cluster.balance.rebalance import BalanceGoal, predict, rebalance
from cluster.control.shard_fleet import ShardReport
from experts.epoch import Epoch
from experts.expert_dtype import ExpertDtype
from experts.expert_shape import ExpertShape
from experts.placement import ExpertPlacement, ShardId
from experts.shard_speed import ShardSpeed

WINDOW_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceQuestion:
    """All that a decision needs. measured_busy: the part of the last minutes that each shard computed, as far as is
    known."""

    placement: ExpertPlacement
    traffic: ExpertTraffic
    fleet: Fleet
    goal: BalanceGoal
    measured_busy: Mapping[ShardId, float | None]

    def decide(self) -> Plan | Refusal:
        """May take a second or more for a large model."""
        return rebalance(self.placement, self.traffic, self.fleet, self.goal)

    def predict(self) -> Prediction:
        """How busy the shards are by the model."""
        return predict(self.placement, self.traffic, self.fleet)


class Balancer:
    """Hears of every shard's work."""

    def __init__(self) -> None:
        self._window = LoadWindow(WINDOW_S)
        self._busy = BusyFraction(WINDOW_S)
        self._reports: dict[ShardId, ShardReport] = {}

    def note(self, shard_id: ShardId, report: ShardReport, now_s: float) -> None:
        self._reports[shard_id] = report
        self._window.report(shard_id, report.work.by_slot, now_s)
        self._busy.report(shard_id, report.work.busy_s, now_s)

    def forget(self, shard_id: ShardId) -> None:
        """The shard has gone. What it did still counts for its experts."""
        self._reports.pop(shard_id, None)
        self._window.forget(shard_id)
        self._busy.forget(shard_id)

    def question(
        self, epoch: Epoch, shape: ExpertShape, *, dtype: ExpertDtype, goal: BalanceGoal, now_s: float
    ) -> BalanceQuestion | Refusal:
        """Refuses (NOT_READY) while not enough is known of the shards of the epoch. dtype: of the experts."""
        ids = [address.shard_id for address in epoch.shards]
        silent = [shard_id for shard_id in ids if shard_id not in self._reports]
        if silent:
            return not_ready(f"nothing is known of {', '.join(silent)}")
        speed = self._speed(ids)
        if speed is None:
            return not_ready("no shard has measured how fast it is")
        slot_bytes = shape.slot_bytes(dtype)
        shards = tuple(
            ShardResources(
                shard_id=address.shard_id,
                node_id=address.node_id,
                memory_bytes=slot_bytes * self._max_slots(address.shard_id, epoch),
                speed=speed,
            )
            for address in epoch.shards
        )
        return BalanceQuestion(
            placement=epoch.placement,
            traffic=self._window.traffic(now_s),
            fleet=Fleet(shards=shards, slot_bytes=slot_bytes, flops_per_row=shape.flops_per_row),
            goal=goal,
            measured_busy={shard_id: self._busy.of(shard_id) for shard_id in ids},
        )

    def _speed(self, shard_ids: list[ShardId]) -> ShardSpeed | None:
        """The same for all: shards of a service are alike, and a measurement is only as good as its moment was."""
        speeds = [speed for shard_id in shard_ids if (speed := self._reports[shard_id].work.speed) is not None]
        if not speeds:
            return None
        return ShardSpeed(
            bytes_per_s=median(speed.bytes_per_s for speed in speeds),
            flops_per_s=median(speed.flops_per_s for speed in speeds),
        )

    def _max_slots(self, shard_id: ShardId, epoch: Epoch) -> int:
        """What the shard holds, and an equal part of what is free of the memory that it shares with others."""
        pool = self._reports[shard_id].memory_pool
        sharing = [report for report in self._reports.values() if report.memory_pool == pool]
        num_free = min(report.num_free_slots for report in sharing)
        return len(epoch.placement.slots_of(shard_id)) + num_free // len(sharing)


def not_ready(sentence: str) -> Refusal:
    return Refusal(reason=RefusalReason.NOT_READY, sentence=sentence)
