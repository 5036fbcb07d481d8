"""`bench dispatch`: rows to shards and back, with experts that answer what they get: the cost of a lane alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import cast

import torch

from cluster.bench.plot import Panel
from cluster.bench.rows import Row
from cluster.bench.shard_children import ShardChildren, ShardTierSpec
from cluster.bench.summary import percentile
from experts.dispatch import Dispatcher, LocalDispatcher
from experts.expert_shape import ExpertShape
from experts.lane import LaneDispatcher
from experts.placement import ShardId, Slot
from experts.shard import Shard
from experts.stand_in import EchoExpert
from experts.transport.names import LANE_TRANSPORTS, LaneTransport
from experts.transport.select import connector

LOCAL = "local"
TRANSPORTS: tuple[str, ...] = (LOCAL, *(name for name in LANE_TRANSPORTS if name != "auto"))
LAYER = 0
DTYPE = torch.bfloat16
TIMEOUT_S = 30.0
# One turn of each transport; they take turns until all samples are there.
ROUND_TRIPS_PER_TURN = 50

PANELS = (
    Panel(title="there and back, p50, us", x="rows", y="p50_us", series="transport", where={"bench": "dispatch"}),
    Panel(title="there and back, p99, us", x="rows", y="p99_us", series="transport", where={"bench": "dispatch"}),
)
NOTES = (
    "One dispatch and its combine: rows are scaled by their score, grouped by expert, sent to the shards, echoed, and "
    "put back in place; row i goes to expert i modulo the number of experts, one expert per shard. Each shard is a "
    "process. Transports take turns in one run; their answers are compared with the rows that were sent.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchCases:
    """row_bytes is a multiple of a bfloat16's 2 bytes. num_threads: of this process."""

    transports: Sequence[str]
    num_shards: int
    num_rows: Sequence[int]
    row_bytes: int
    num_samples: int
    num_threads: int

    def __post_init__(self) -> None:
        if self.row_bytes % DTYPE.itemsize or self.row_bytes < DTYPE.itemsize:
            raise ValueError(f"row-bytes must be a positive multiple of {DTYPE.itemsize}, got {self.row_bytes}")
        if unknown := set(self.transports) - set(TRANSPORTS):
            raise ValueError(f"transports must be of {', '.join(TRANSPORTS)}, got {', '.join(sorted(unknown))}")

    @property
    def hidden_size(self) -> int:
        return self.row_bytes // DTYPE.itemsize


def run_dispatch_bench(cases: DispatchCases) -> list[Row]:
    """Raises ChildError when a shard does not start, RuntimeError when an answer is wrong or missing."""
    torch.set_num_threads(cases.num_threads)
    spec = ShardTierSpec(
        num_shards=cases.num_shards,
        model="",
        shape=ExpertShape(hidden_size=cases.hidden_size, intermediate_size=1, num_experts=cases.num_shards),
        moe_layers=(LAYER,),
        dtype=str(DTYPE).removeprefix("torch."),
        num_threads=1,
        echo_s=0.0,
    )
    with ShardChildren(spec) as shards:
        dispatchers = {name: _dispatcher(name, shards, cases) for name in cases.transports}
        try:
            with torch.inference_mode():
                steps = count(1)
                return [row for num_rows in cases.num_rows for row in _measure(dispatchers, cases, num_rows, steps)]
        finally:
            for dispatcher in dispatchers.values():
                dispatcher.close()


def _dispatcher(transport: str, shards: ShardChildren, cases: DispatchCases) -> Dispatcher:
    if transport == LOCAL:
        slots = {Slot(LAYER, expert): EchoExpert() for expert in range(cases.num_shards)}
        return LocalDispatcher(Shard(shard_id=ShardId(LOCAL), slots=slots, hidden_size=cases.hidden_size, dtype=DTYPE))
    lanes = LaneDispatcher(
        lane_id=transport,
        epoch=shards.epoch,
        secret=shards.secret,
        timeout_s=TIMEOUT_S,
        connect=connector(cast("LaneTransport", transport)),
    )
    _require_all(lanes)
    return lanes


def _measure(
    dispatchers: dict[str, Dispatcher], cases: DispatchCases, num_rows: int, steps: Iterator[int]
) -> list[Row]:
    x_TD = torch.randn(num_rows, cases.hidden_size).to(DTYPE)
    topk_ids_T1 = (torch.arange(num_rows) % cases.num_shards).unsqueeze(1)
    topk_scores_T1 = torch.ones(num_rows, 1)
    seconds: dict[str, list[float]] = {name: [] for name in dispatchers}
    while any(len(own) < cases.num_samples for own in seconds.values()):
        for name, dispatcher in dispatchers.items():
            for _ in range(ROUND_TRIPS_PER_TURN):
                started_at = time.perf_counter()
                dispatcher.begin_step(next(steps))
                combined = dispatcher.combine(dispatcher.dispatch(LAYER, x_TD, topk_ids_T1, topk_scores_T1))
                seconds[name].append(time.perf_counter() - started_at)
            _require_all(dispatcher)
            if not torch.equal(combined.y_TD, x_TD):
                raise RuntimeError(f"{name}: the rows that came back are not those that were sent")
    return [_row(name, cases, num_rows, own[ROUND_TRIPS_PER_TURN:] or own) for name, own in seconds.items()]


def _require_all(dispatcher: Dispatcher) -> None:
    if dispatcher.lost:
        raise RuntimeError("; ".join(dispatcher.lost.values()))


def _row(transport: str, cases: DispatchCases, num_rows: int, seconds: Sequence[float]) -> Row:
    percents = {"p50_us": 50, "p10_us": 10, "p90_us": 90, "p99_us": 99, "min_us": 0}
    return {
        "bench": "dispatch",
        "transport": transport,
        "shards": cases.num_shards,
        "rows": num_rows,
        "row_bytes": cases.row_bytes,
        "threads": cases.num_threads,
        **{name: round(percentile(seconds, percent) * 1e6, 2) for name, percent in percents.items()},
        "num_samples": len(seconds),
    }
