"""How long rebalance thinks about the models of the family, in seconds of CPU time.

``OMP_NUM_THREADS=1 PYTHONPATH=. python tests/bench/rebalance_time.py``
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from cluster.balance.expert_traffic import ExpertTraffic, SlotTraffic
from cluster.balance.fleet import Fleet, ShardResources
from cluster.balance.plan import Plan
from cluster.balance.rebalance import BalanceGoal, rebalance
from experts.placement import ShardId, Slot, place
from experts.shard_speed import TILE_ROWS, ShardSpeed

SLOT_BYTES, FLOPS_PER_ROW = 10**6, 10**6
SPEED = ShardSpeed(bytes_per_s=3e10, flops_per_s=6e11)
SHARDS_PER_NODE = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """spare: slots that each shard has room for besides its own. skew: of Zipf's law, over experts in any order."""

    name: str
    num_layers: int
    num_experts: int
    num_tokens: int
    num_steps: int = 100
    num_shards: int = 16
    copies: int = 1
    spare: int = 48
    skew: float = 0.8


CASES = (
    Case(name="Maverick prefill", num_layers=24, num_experts=128, num_tokens=8192),
    Case(name="Maverick prefill, 2 copies", num_layers=24, num_experts=128, num_tokens=8192, copies=2),
    Case(name="Maverick prefill, 2 free slots", num_layers=24, num_experts=128, num_tokens=8192, spare=2),
    Case(name="Maverick prefill, full", num_layers=24, num_experts=128, num_tokens=8192, spare=0),
    Case(name="Maverick decode", num_layers=24, num_experts=128, num_tokens=128, num_steps=1000),
    Case(name="Behemoth prefill", num_layers=88, num_experts=16, num_tokens=8192, spare=88),
    Case(name="Behemoth decode", num_layers=88, num_experts=16, num_tokens=128, num_steps=1000, spare=88),
)


def traffic(case: Case) -> ExpertTraffic:
    random = np.random.default_rng(0)
    by_slot: dict[Slot, SlotTraffic] = {}
    for layer in range(case.num_layers):
        weights = 1 / np.arange(1, case.num_experts + 1) ** case.skew
        random.shuffle(weights)
        rows = random.multinomial(case.num_tokens, weights / weights.sum(), size=case.num_steps)
        tiles = -(-rows // TILE_ROWS)
        for expert in range(case.num_experts):
            by_slot[Slot(layer, expert)] = SlotTraffic(int(rows[:, expert].sum()), int(tiles[:, expert].sum()))
    return ExpertTraffic(span_s=60.0, by_slot=by_slot)


def measure(case: Case) -> str:
    ids = [ShardId(f"shard-{index}") for index in range(case.num_shards)]
    nodes = {shard: f"node-{index // SHARDS_PER_NODE}" for index, shard in enumerate(ids)}
    current = place(
        moe_layers=range(case.num_layers),
        num_experts=case.num_experts,
        shard_ids=ids,
        copies=case.copies,
        nodes=nodes,
    )
    shards = tuple(
        ShardResources(
            shard_id=shard,
            node_id=nodes[shard],
            memory_bytes=(len(current.slots_of(shard)) + case.spare) * SLOT_BYTES,
            speed=SPEED,
        )
        for shard in ids
    )
    fleet = Fleet(shards=shards, slot_bytes=SLOT_BYTES, flops_per_row=FLOPS_PER_ROW)
    seen = traffic(case)
    started_at = time.process_time()
    outcome = rebalance(current, seen, fleet, BalanceGoal(min_copies=case.copies))
    elapsed_s = time.process_time() - started_at
    if not isinstance(outcome, Plan):
        return f"{case.name}: {elapsed_s:.2f} s, {outcome.reason.value}"
    loads = [len(stage.additions) for stage in outcome.stages]
    change = f"{outcome.before.imbalance:.3f} -> {outcome.after.imbalance:.3f}"
    return f"{case.name}: {elapsed_s:.2f} s, imbalance {change}, slots loaded by stage {loads}"


if __name__ == "__main__":
    for each in CASES:
        print(measure(each), flush=True)
