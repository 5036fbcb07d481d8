"""`bench serve`: what clients of a running service see under a load that does not wait for answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.bench.arrivals import poisson_arrivals
from cluster.bench.grpc_load import GrpcLoad
from cluster.bench.http_load import HttpLoad
from cluster.bench.open_loop import Ask, LoadClient, run_open_loop
from cluster.bench.plot import Panel
from cluster.bench.rows import Row
from cluster.bench.stream_timing import Goal, summarize

# What the first answers after a start cost is another matter.
NUM_WARM_UP_ASKS = 2

PANELS = (
    Panel(title="time to first token, p50, ms", x="rate", y="ttft_p50_ms", series="protocol", where={"bench": "serve"}),
    Panel(title="time per token, p50, ms", x="rate", y="tpot_p50_ms", series="protocol", where={"bench": "serve"}),
    Panel(title="goodput, requests/s", x="rate", y="goodput_per_s", series="protocol", where={"bench": "serve"}),
)
NOTES = (
    "Open loop: requests leave at Poisson arrivals of the given rate, however many are under way. ttft runs from when "
    "a request was due; tpot is an answer's mean time between tokens; longest_gap its longest wait for a message. "
    "goodput counts answers within both limits of the goal. late_p99 is how far the client itself lagged behind. "
    "Prompts are random and greedy, no token ends an answer early.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeCases:
    """Each rate with each protocol that has an address: grpc "host:port", http a URL without a path."""

    grpc_address: str | None
    http_url: str | None
    rates: Sequence[float]
    num_requests: int
    prompt_tokens: int
    max_tokens: int
    vocab_size: int
    goal: Goal
    timeout_s: float
    seed: int

    def asks(self, count: int, seed: int) -> list[Ask]:
        rng = random.Random(seed)
        first = self.vocab_size // 2
        return [
            Ask(
                prompt_ids=[rng.randrange(first, self.vocab_size) for _ in range(self.prompt_tokens)],
                max_tokens=self.max_tokens,
            )
            for _ in range(count)
        ]


async def run_serve_bench(cases: ServeCases) -> list[Row]:
    """Raises AskFailedError when a service does not answer at all."""
    rows: list[Row] = []
    for index, rate in enumerate(cases.rates):
        if cases.grpc_address is not None:
            rows.append(await _measure(GrpcLoad(cases.grpc_address), "grpc", cases, rate, 2 * index))
        if cases.http_url is not None:
            rows.append(await _measure(await HttpLoad.open(cases.http_url), "http", cases, rate, 2 * index + 1))
    return rows


async def _measure(client: LoadClient, protocol: str, cases: ServeCases, rate: float, number: int) -> Row:
    """number: tells the runs apart, so that no prompt is found in a prefix cache."""
    try:
        seed = cases.seed + 1_000 * number
        warm_up = cases.asks(NUM_WARM_UP_ASKS, seed + 1)
        await run_open_loop(client, warm_up, [0.0] * len(warm_up), timeout_s=cases.timeout_s)
        arrivals = poisson_arrivals(rate=rate, count=cases.num_requests, seed=cases.seed)
        asks = cases.asks(cases.num_requests, seed + 2)
        timings = await run_open_loop(client, asks, arrivals, timeout_s=cases.timeout_s)
    finally:
        await client.close()
    return {
        "bench": "serve",
        "protocol": protocol,
        "rate": rate,
        "prompt_tokens": cases.prompt_tokens,
        "max_tokens": cases.max_tokens,
        "goal_ttft_ms": cases.goal.time_to_first_s * 1e3,
        "goal_tpot_ms": cases.goal.time_per_token_s * 1e3,
        **summarize(timings, cases.goal),
    }


def run(cases: ServeCases) -> list[Row]:
    return asyncio.run(run_serve_bench(cases))
