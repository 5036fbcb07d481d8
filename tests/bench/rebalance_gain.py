"""Whether a rebalance brings what it predicts: the slowest shard's busy time for the same requests, before and after.

    arriero checkpoint create --preset mid --expert-skew 0.8:1 --out mid-skewed
    arriero serve --model mid-skewed --shards 2 --http-port 8000
    python tests/bench/rebalance_gain.py --http-port 8000

The requests are long prompts, one at a time. Prints one line of JSON. Busy time is of the shards' own clocks: on a
machine with fewer cores than shards and routers it contains their waiting for a core, which their CPU time does not.
Both are of shards on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

from cluster.client import ArrieroClient
from cluster.client_types import Sampling
from cluster.commands.rebalance import rebalance, response_to_json
from cluster.commands.status import call_admin, find_service, get_view
from cluster.v1 import admin_pb2

MAX_ID = 250


class Service(NamedTuple):
    address: str
    token: str
    http_port: int

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Busy and CPU seconds of each shard."""
        return busy_s(self.http_port), cpu_s(self.address, self.token)


def busy_s(http_port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/metrics", timeout=10) as answer:
        found = re.findall(
            r'arriero:shard_busy_seconds_total\{.*?member="(shard-[^"]+)".*?\} (\S+)', answer.read().decode()
        )
    return {shard: float(seconds) for shard, seconds in found}


def work(client: ArrieroClient, salt: str, *, num_requests: int, num_tokens: int) -> None:
    for number in range(num_requests):
        ids = random.Random(number).choices(range(MAX_ID), k=num_tokens)
        list(client.generate(ids, sampling=Sampling(max_tokens=1, ignore_eos=True), cache_salt=f"{salt}/{number}"))


def cpu_s(address: str, token: str) -> dict[str, float]:
    """What the shards' processes have computed in all, by the kernel's clock."""
    found: dict[str, float] = {}
    for shard in get_view(address, token).shards:
        after_name = Path(f"/proc/{shard.member.pid}/stat").read_text().rpartition(")")[2].split()
        found[shard.member.id] = (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")
    return found


def slowest_s(service: Service, client: ArrieroClient, salt: str, arguments: argparse.Namespace) -> list[float]:
    """The largest busy and the largest CPU time that these requests take of a shard."""
    before = service.read()
    work(client, salt, num_requests=arguments.requests, num_tokens=arguments.tokens)
    return [
        max(after[shard] - seconds for shard, seconds in of_clock.items())
        for of_clock, after in zip(before, service.read(), strict=True)
    ]


def move(address: str, token: str) -> dict[str, object]:
    response = rebalance(address, token, dry_run=False)
    request = admin_pb2.GetRebalanceRequest(rebalance_id=response.rebalance_id)
    while (found := call_admin(address, token, lambda admin: admin.GetRebalance, request)).state == "moving":
        time.sleep(0.2)
    if found.state != "done":
        raise SystemExit(f"given up: {found.reason}")
    return response_to_json(response)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1024)
    arguments = parser.parse_args()
    service = Service(*find_service(None), arguments.http_port)
    with ArrieroClient(service.address) as client:
        slowest_s(service, client, "warm", arguments)
        before_s = slowest_s(service, client, "before", arguments)
        plan = move(service.address, service.token)
        slowest_s(service, client, "warm again", arguments)
        after_s = slowest_s(service, client, "after", arguments)
    predicted = [max(shard["busy"] for shard in plan[when]["shards"]) for when in ("before", "after")]  # type: ignore[index]
    told = {
        "slowest_busy_s": [round(before_s[0], 3), round(after_s[0], 3)],
        "slowest_cpu_s": [round(before_s[1], 3), round(after_s[1], 3)],
        "busy_drop": round(1 - after_s[0] / before_s[0], 3),
        "cpu_drop": round(1 - after_s[1] / before_s[1], 3),
        "predicted_drop": round(1 - predicted[1] / predicted[0], 3),
        "imbalance": [round(plan[when]["imbalance"], 3) for when in ("before", "after")],  # type: ignore[index]
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
