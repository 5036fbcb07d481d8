"""Whether a rebalance brings what it predicts: the slowest shard's busy time for the same requests, before and after.

    arriero checkpoint create --preset mid --expert-skew 0.8:1 --out mid-skewed
    arriero serve --model mid-skewed --shards 2 --http-port 8000
    python tests/bench/rebalance_gain.py --http-port 8000

The requests are long prompts, one at a time. Prints one line of JSON. Busy time is of the shards' own clocks: on a
machine with fewer cores than shards and routers it contains their waiting for a core.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
import urllib.request

from cluster.client import ArrieroClient
from cluster.client_types import Sampling
from cluster.commands.rebalance import rebalance, response_to_json
from cluster.commands.status import call_admin, find_service
from cluster.v1 import admin_pb2

MAX_ID = 250


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


def slowest_s(http_port: int, client: ArrieroClient, salt: str, arguments: argparse.Namespace) -> float:
    """Of all shards, the one that these requests keep busy for longest."""
    before = busy_s(http_port)
    work(client, salt, num_requests=arguments.requests, num_tokens=arguments.tokens)
    return max(seconds - before[shard] for shard, seconds in busy_s(http_port).items())


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
    address, token = find_service(None)
    with ArrieroClient(address) as client:
        slowest_s(arguments.http_port, client, "warm", arguments)
        before_s = slowest_s(arguments.http_port, client, "before", arguments)
        plan = move(address, token)
        slowest_s(arguments.http_port, client, "warm again", arguments)
        after_s = slowest_s(arguments.http_port, client, "after", arguments)
    predicted = [max(shard["busy"] for shard in plan[when]["shards"]) for when in ("before", "after")]  # type: ignore[index]
    told = {
        "slowest_busy_before_s": round(before_s, 3),
        "slowest_busy_after_s": round(after_s, 3),
        "measured_drop": round(1 - after_s / before_s, 3),
        "predicted_drop": round(1 - predicted[1] / predicted[0], 3),
        "imbalance": [round(plan[when]["imbalance"], 3) for when in ("before", "after")],  # type: ignore[index]
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
