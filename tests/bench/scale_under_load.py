"""Shards 2 -> 3 -> 5 -> 2 and routers 1 -> 3 -> 1 under streams: what is lost, how long each epoch holds a router up,
and the tokens that come meanwhile, as a plot.

    PYTHONPATH=tests .venv/bin/python tests/bench/scale_under_load.py --out tests/bench/results

Eight streams begin; 24 more make routers come, by the service's own policy; shards are added and taken away; then the
24 end, and routers go. Ends with 1 where a request failed, or two answers to one request are not the same.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median

from chaos import invariants
from chaos.load import Ask, Load, draw_asks
from chaos.record import StreamRecord
from chaos.service import running_service
from chaos.target import Target
from conditions import wait_until

from cluster.bench.hardware import describe_hardware
from cluster.control.membership import MemberKind

NUM_FEW, NUM_MORE = 8, 24
MAX_TOKENS = 200
STEADY_S = 15.0
BIN_S = 1.0
WHOLE_S = 240.0
FLAGS = (
    *("--routers", "1", "--max-routers", "3", "--shards", "2", "--max-num-seqs", "16", "--router-seat-target", "0.7"),
    *("--router-up-delay-s", "2", "--router-down-delay-s", "5", "--drain-timeout-s", "60"),
)


@dataclass
class Timeline:
    """Moments in seconds of one monotonic clock."""

    began_s: float = field(default_factory=time.monotonic)
    moments: list[tuple[float, str]] = field(default_factory=list)

    def mark(self, what: str) -> None:
        self.moments.append((time.monotonic() - self.began_s, what))
        print(f"{self.moments[-1][0]:6.1f} s  {what}", flush=True)


def play(target: Target, timeline: Timeline) -> list[StreamRecord]:
    """The streams of the whole run, numbered through by what they ask."""
    asks = draw_asks(NUM_FEW + NUM_MORE, MAX_TOKENS, random.Random(11))
    with loading(target, asks[:NUM_FEW], "few") as few:
        time.sleep(STEADY_S)
        with loading(target, asks[NUM_FEW:], "more") as more:
            timeline.mark(f"{NUM_FEW + NUM_MORE} streams")
            wait_until(lambda: num_routers(target) == 3, "three routers", WHOLE_S)
            timeline.mark("3 routers")
            time.sleep(STEADY_S)
            for num_shards in (3, 5, 2):
                change_shards(target, timeline, num_shards)
                time.sleep(STEADY_S)
            more.stop()
            records = more.finish()
        timeline.mark(f"{NUM_FEW} streams")
        wait_until(lambda: num_routers(target) == 1, "one router", WHOLE_S)
        timeline.mark("1 router")
        time.sleep(STEADY_S)
        few.stop()
        for record in records:
            record.ask += NUM_FEW
        return few.finish() + records


@contextmanager
def loading(target: Target, asks: Sequence[Ask], label: str) -> Iterator[Load]:
    load = Load(target.grpc_address, target.application, asks, label=label)
    try:
        yield load
    finally:
        load.close()


def num_routers(target: Target) -> int | None:
    view = target.view()
    return None if view is None else len(view.ready(MemberKind.ROUTER))


def change_shards(target: Target, timeline: Timeline, num_shards: int) -> None:
    wanted = target.scale_shards(num_shards)
    timeline.mark(f"asked for {num_shards} shards")

    def is_so() -> bool:
        view = target.view()
        return view is not None and {each.member_id for each in view.ready(MemberKind.SHARD) if each.slots} == wanted

    wait_until(is_so, f"{num_shards} shards", WHOLE_S)
    timeline.mark(f"{num_shards} shards")


def pauses_ms(log: str) -> list[tuple[int, float]]:
    """Of each epoch and each router that it found at work."""
    return [(int(epoch), float(pause)) for epoch, pause in re.findall(r"epoch (\d+): pause ([\d.]+) ms", log)]


def differing(records: Sequence[StreamRecord]) -> list[str]:
    """Answers that are not the first answer to the same ask."""
    firsts: dict[int, StreamRecord] = {}
    for record in sorted(records, key=lambda each: each.opened_s):
        firsts.setdefault(record.ask, record)
    return [each.request_id for each in records if each.token_ids != firsts[each.ask].token_ids]


def tokens_per_s(records: Sequence[StreamRecord], began_s: float) -> list[float]:
    """In bins of BIN_S; a stream's tokens are taken to be spread over its messages evenly."""
    last_s = max(arrival_s for record in records for arrival_s in record.arrivals_s)
    bins = [0.0] * (int((last_s - began_s) / BIN_S) + 1)
    for record in records:
        for arrival_s in record.arrivals_s:
            bins[int((arrival_s - began_s) / BIN_S)] += len(record.token_ids) / len(record.arrivals_s) / BIN_S
    return bins


def plot(throughput: Sequence[float], timeline: Timeline, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.step([index * BIN_S for index in range(len(throughput))], throughput, where="post")
    for at_s, what in timeline.moments:
        axes.axvline(at_s, color="grey", linewidth=0.8, linestyle=":")
        axes.text(at_s, axes.get_ylim()[1], what, rotation=90, va="top", ha="right", fontsize=8)
    axes.set(xlabel="seconds", ylabel="tokens/s, all streams", ylim=(0, None), title="shards and routers come and go")
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="Where scale-DATE.json and .png go.")
    parser.add_argument("--log", type=Path, default=Path("build/scale"), metavar="DIR", help="The service's log.")
    arguments = parser.parse_args()
    hardware = describe_hardware()
    arguments.log.mkdir(parents=True, exist_ok=True)
    with running_service(FLAGS, folder=arguments.log, model=None) as target:
        timeline = Timeline()
        records = play(target, timeline)
    throughput = tokens_per_s(records, timeline.began_s)
    pauses = pauses_ms((arguments.log / "log").read_text())
    bad = [*invariants.lost(records), *differing(records)]
    longest_s = max(invariants.longest_pause_s(each, 0.0, float("inf")) for each in records)
    told = {
        "streams": len(records),
        "lost_or_wrong": bad,
        "epochs": len({epoch for epoch, _ in pauses}),
        "pauses_ms": [pause for _, pause in pauses],
        "pause_ms_median": median(pause for _, pause in pauses),
        "pause_ms_max": max(pause for _, pause in pauses),
        "longest_stream_pause_s": round(longest_s, 3),
    }
    print(json.dumps(told))
    if arguments.out is not None:
        name = arguments.out / f"scale-{date.today().isoformat()}"
        data = {**told, "hardware": hardware, "moments": timeline.moments, "tokens_per_s": throughput}
        name.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        plot(throughput, timeline, name.with_suffix(".png"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
