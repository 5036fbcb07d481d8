"""What `make demo` runs: a small model with random weights, one router and four expert shards, on this machine.

Its answers are noise; what it shows is the path of a request, and which shard's expert took which tokens.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cluster.checkpoints.presets import create_checkpoint
from cluster.client import ArrieroClient
from cluster.client_types import Sampling
from cluster.commands.status import find_service, get_view
from cluster.v1 import admin_pb2

NUM_SHARDS = 4
NUM_STREAMS = 8
MAX_TOKENS = 64
PROMPTS = ("Where do llamas live?", "What does an arriero do?", "Count the stars over the Altiplano.")
STOP_TIMEOUT_S = 60.0
LOAD_TIMEOUT_S = 5.0


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="arriero-demo-") as folder:
        say("making a checkpoint: tiny-maverick, 8 layers, 8 experts in every second one, random weights")
        model = create_checkpoint("tiny-maverick", Path(folder, "tiny-maverick"))
        log = Path(folder, "serve.log")
        with log.open("w") as log_file, running_service(model, log_file) as address:
            if address is None:
                print(log.read_text(), file=sys.stderr)
                return 1
            show(address)
    say("stopped; nothing is left")
    return 0


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


@contextmanager
def running_service(model: Path, log_file: IO[str]) -> Iterator[str | None]:
    """`arriero serve` as a user would start it; its gRPC address, or None where it did not start."""
    grpc_port, http_port = free_ports(2)
    flags = ["--model", str(model), "--routers", "1", "--shards", str(NUM_SHARDS)]
    flags += ["--grpc-port", str(grpc_port), "--http-port", str(http_port)]
    say(f"arriero serve {' '.join(flags)}")
    started_s = time.perf_counter()
    command = [sys.executable, "-m", "cluster.cli", "serve", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log_file, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline().strip()
        print(f"{line}  (after {time.perf_counter() - started_s:.1f} s)" if line else "it did not start", flush=True)
        yield f"127.0.0.1:{grpc_port}" if line else None
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_TIMEOUT_S)


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def show(address: str) -> None:
    with ArrieroClient(address) as client:
        for prompt in PROMPTS:
            say(prompt)
            stream_one(client, prompt)
        say(f"{NUM_STREAMS} streams at once")
        num_tokens = stream_many(client)
    say("which expert served what: tokens by shard, decoder layer and expert")
    print_load(wait_for_load(address, num_tokens))


def stream_one(client: ArrieroClient, prompt: str) -> None:
    started_s = time.perf_counter()
    times_s: list[float] = []
    num_tokens = 0
    for piece in client.generate(prompt, sampling=Sampling(max_tokens=MAX_TOKENS, ignore_eos=True)):
        print(printable(piece.text), end="", flush=True)
        num_tokens += len(piece.token_ids)
        times_s.append(time.perf_counter())
    rate = (num_tokens - 1) / (times_s[-1] - times_s[0])
    print(f"\n-- first token after {1000 * (times_s[0] - started_s):.0f} ms, then {rate:.0f} tokens/s", flush=True)


def printable(text: str) -> str:
    """Random weights write random bytes; a terminal should not obey them."""
    return "".join(character if character.isprintable() else "\N{MIDDLE DOT}" for character in text)


def stream_many(client: ArrieroClient) -> int:
    """Returns the tokens made."""

    def stream(index: int) -> int:
        sampling = Sampling(max_tokens=MAX_TOKENS, ignore_eos=True)
        return sum(len(piece.token_ids) for piece in client.generate(f"Llama number {index}", sampling=sampling))

    started_s = time.perf_counter()
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        num_tokens = sum(pool.map(stream, range(NUM_STREAMS)))
    print(f"{num_tokens} tokens, {num_tokens / (time.perf_counter() - started_s):.0f} tokens/s in all", flush=True)
    return num_tokens


def wait_for_load(address: str, num_tokens: int) -> admin_pb2.GetViewResponse:
    """Shards report twice a second: waits until every layer has seen at least the tokens of the last round."""
    _, token = find_service(address)
    deadline = time.monotonic() + LOAD_TIMEOUT_S
    while True:
        view = get_view(address, token)
        by_layer: dict[int, int] = defaultdict(int)
        for load in view.load:
            by_layer[load.layer] += load.tokens
        if (by_layer and min(by_layer.values()) >= num_tokens) or time.monotonic() > deadline:
            return view
        time.sleep(0.1)


def print_load(view: admin_pb2.GetViewResponse) -> None:
    tokens = {(load.layer, load.expert): load.tokens for load in view.load}
    for shard in view.shards:
        slots = [(slot.layer, slot.expert) for slot in shard.slots]
        total = sum(tokens.get(slot, 0) for slot in slots)
        print(f"{shard.member.id} (pid {shard.member.pid}): {total} tokens")
        for layer in sorted({layer for layer, _ in slots}):
            experts = [f"expert {slot[1]}: {tokens.get(slot, 0)}" for slot in slots if slot[0] == layer]
            print(f"    layer {layer}   {', '.join(experts)}")


if __name__ == "__main__":
    sys.exit(main())
