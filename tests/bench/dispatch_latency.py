"""How long rows take to shards in processes of their own and back. Run by hand; see experts/README.md.

    python tests/bench/dispatch_latency.py --transport shm tcp --shards 4 --rows 8 --row-bytes 1024

The experts only negate, so what is measured is the way: dispatch and combine as a router calls them. One JSON line
per transport; with several rounds the transports take turns, so that a busy machine is unfair to all alike.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from statistics import quantiles

import torch

from experts.epoch import Epoch, ShardAddress
from experts.lane import LaneDispatcher
from experts.placement import ShardId, Slot, place
from experts.server import ShardServer
from experts.shard import Shard
from experts.transport.select import connector
from experts.transport.waiting import WaitPolicy

SECRET = b"a secret of the measurement"
LAYER = 1
DTYPE = torch.bfloat16


class Negate:
    """Stands for an expert's weights."""

    num_bytes = 0

    def __call__(self, x_RD: torch.Tensor) -> torch.Tensor:
        return -x_RD


def be_a_shard(hidden_size: int, epoch_of: str, shard_id: str, spin_us: str) -> None:
    torch.set_num_threads(1)
    slots = {Slot(LAYER, expert): Negate() for expert in json.loads(epoch_of)}
    shard = Shard(shard_id=ShardId(shard_id), slots=slots, hidden_size=hidden_size, dtype=DTYPE)  # type: ignore[arg-type]
    server = ShardServer(shard, secret=SECRET, wait=WaitPolicy(spin_s=float(spin_us) / 1e6))
    server.start()
    print(json.dumps(asdict(server.address("here"))), flush=True)
    for line in sys.stdin:
        shard.serve_epoch(Epoch.from_dict(json.loads(line)))
        print("ok", flush=True)


@contextmanager
def shards(num_shards: int, num_experts: int, hidden_size: int, spin_us: float) -> Iterator[Epoch]:
    ids = [ShardId(f"shard-{index}") for index in range(num_shards)]
    placement = place(moe_layers=[LAYER], num_experts=num_experts, shard_ids=ids)
    with ExitStack() as stack:
        processes = []
        for shard_id in ids:
            experts = json.dumps([slot.expert for slot in placement.slots_by_shard[shard_id]])
            command = [sys.executable, __file__, "--be-a-shard", str(hidden_size), experts, shard_id, str(spin_us)]
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)
            processes.append(process)
        addresses = [ShardAddress(**json.loads(process.stdout.readline())) for process in processes]
        epoch = Epoch(number=1, weights_version=0, shards=tuple(addresses), placement=placement)
        for process in processes:
            process.stdin.write(json.dumps(epoch.to_dict()) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "ok\n"
        yield epoch


def measure(lane: LaneDispatcher, num_rows: int, num_experts: int, hidden_size: int, steps: range) -> list[float]:
    x_TD = torch.randn(num_rows, hidden_size).to(DTYPE)
    ids_TK = (torch.arange(num_rows) % num_experts).unsqueeze(1)
    scores_TK = torch.ones(num_rows, 1)
    taken_us = []
    for step in steps:
        lane.begin_step(step)
        started_at = time.perf_counter()
        combined = lane.combine(lane.dispatch(LAYER, x_TD, ids_TK, scores_TK))
        taken_us.append((time.perf_counter() - started_at) * 1e6)
    assert torch.equal(combined.y_TD, -x_TD)
    return taken_us


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transport", nargs="+", default=["tcp"])
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row-bytes", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--spin-us", type=float, default=100)
    parser.add_argument("--be-a-shard", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.be_a_shard:
        be_a_shard(int(args.be_a_shard[0]), *args.be_a_shard[1:])
        return
    torch.set_num_threads(1)
    wait = WaitPolicy(spin_s=args.spin_us / 1e6)
    hidden_size, num_experts = args.row_bytes // DTYPE.itemsize, max(args.shards, 8)
    with torch.inference_mode(), shards(args.shards, num_experts, hidden_size, args.spin_us) as epoch:
        lanes = {
            name: LaneDispatcher(
                lane_id=name, epoch=epoch, secret=SECRET, timeout_s=30, connect=connector(name), wait=wait
            )
            for name in args.transport
        }
        for first in range(args.rounds):
            for name, lane in lanes.items():
                steps = range(first * args.steps, (first + 1) * args.steps)
                taken_us = measure(lane, args.rows, num_experts, hidden_size, steps)
                cuts = quantiles(taken_us, n=100)
                print(
                    json.dumps(
                        {
                            "transport": name,
                            "shards": args.shards,
                            "rows": args.rows,
                            "min_us": round(min(taken_us), 1),
                            "p50_us": round(cuts[49], 1),
                            "p99_us": round(cuts[98], 1),
                        }
                    )
                )


if __name__ == "__main__":
    main()
