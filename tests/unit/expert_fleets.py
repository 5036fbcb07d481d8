"""Fleets and traffic to decide about. Reading an expert takes 1 ms, computing a row 0.1 ms: ten rows cost a reading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from random import Random

from cluster.balance.expert_traffic import ExpertTraffic, SlotTraffic
from cluster.balance.fleet import Fleet, ShardResources
from experts.placement import ShardId, Slot
from experts.shard_speed import TILE_ROWS, ShardSpeed

SLOT_BYTES = 1000
FLOPS_PER_ROW = 100
SPEED = ShardSpeed(bytes_per_s=1e6, flops_per_s=1e6)
SPAN_S = 60.0


def shard_ids(count: int) -> list[ShardId]:
    return [ShardId(f"shard-{index:02}") for index in range(count)]


def fleet(
    slots: Sequence[int], *, nodes: Sequence[str] | None = None, speeds: Sequence[ShardSpeed] | None = None
) -> Fleet:
    """slots: how many each shard has memory for. nodes: by default one for each shard."""
    resources = (
        ShardResources(
            shard_id=shard_id,
            node_id=f"node-{index}" if nodes is None else nodes[index],
            memory_bytes=slots[index] * SLOT_BYTES + SLOT_BYTES // 2,
            speed=SPEED if speeds is None else speeds[index],
        )
        for index, shard_id in enumerate(shard_ids(len(slots)))
    )
    return Fleet(shards=tuple(resources), slot_bytes=SLOT_BYTES, flops_per_row=FLOPS_PER_ROW)


def traffic_of_steps(steps: Iterable[Mapping[Slot, int]]) -> ExpertTraffic:
    """steps: rows of each slot in one step of one router; shards compute them tile by tile."""
    by_slot: dict[Slot, SlotTraffic] = {}
    for rows_by_slot in steps:
        for slot, rows in rows_by_slot.items():
            tiles = SlotTraffic(rows, -(-rows // TILE_ROWS))
            by_slot[slot] = by_slot.get(slot, SlotTraffic(0, 0)).plus(tiles)
    return ExpertTraffic(span_s=SPAN_S, by_slot=by_slot)


def skewed_steps(
    *, layers: Sequence[int], num_experts: int, num_steps: int, num_tokens: int, skew: tuple[float, int], seed: int = 0
) -> list[dict[Slot, int]]:
    """Each token goes to one expert; skew: (share of the tokens, experts that share them), from expert 0 on."""
    random = Random(seed)
    share, num_hot = skew
    weights = [share / num_hot if e < num_hot else (1 - share) / (num_experts - num_hot) for e in range(num_experts)]
    steps: list[dict[Slot, int]] = []
    for _ in range(num_steps):
        step: dict[Slot, int] = {}
        for layer in layers:
            for expert in random.choices(range(num_experts), weights, k=num_tokens):
                slot = Slot(layer, expert)
                step[slot] = step.get(slot, 0) + 1
        steps.append(step)
    return steps
