"""The benchmarks on models so small that only their machinery is tried, and what they do when something is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from cluster.bench.child import Child, ChildError
from cluster.bench.contestant import Contestant, Timing
from cluster.bench.race import Race
from cluster.checkpoints.presets import create_checkpoint

CONSTANT = 'import sys\nfor line in sys.stdin:\n    print(\'{"seconds": [1.0], "cpu_seconds": [1.0]}\', flush=True)'
ECHO = (
    "import sys, json\n"
    "for line in sys.stdin:\n"
    "    print(json.dumps({'seconds': [1.0], 'cpu_seconds': [1.0], **json.loads(line)}), flush=True)"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_checkpoint("tiny-maverick", tmp_path_factory.mktemp("bench") / "tiny")


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def rows_of(completed: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert completed.returncode == 0, completed.stderr
    rows: list[dict[str, Any]] = json.loads(completed.stdout)
    return rows


ENGINE = ("engine", "--dtype", "float32", "--threads", "1", "--steps", "4", "--prefills", "2", "--json")


def test_engine_bench_measures_all_contestants_and_says_who_is_absent(checkpoint: Path, tmp_path: Path) -> None:
    rows = rows_of(
        bench(
            *ENGINE, "--model", checkpoint, "--batch", "1,3", "--prompt-tokens", "8", "--prefill", "40",
            "--peers", "transformers,llama.cpp,vllm", "--peer-python", "vllm=/no/such/python", "--out", tmp_path,
        )
    )  # fmt: skip
    timed = [row for row in rows if "p50_ms" in row]
    measured = {(row["bench"], row["contestant"], row["batch"], row["prompt_tokens"]) for row in timed}
    assert measured == {
        (name, contestant, batch, tokens)
        for name, batch, tokens in (("decode", 1, 8), ("decode", 3, 8), ("prefill", 1, 40))
        for contestant in ("arriero", "transformers")
    }
    assert {row["contestant"]: row["absent"] for row in rows if "absent" in row}.keys() == {"llama.cpp", "vllm"}
    for row in timed:
        assert 0 < row["min_ms"] <= row["p10_ms"] <= row["p50_ms"] <= row["p90_ms"]
        assert row["tokens_per_s"] > 0
        assert (row["dtype"], row["threads"], row["shards"]) == ("float32", 1, 0)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}


def test_another_checkout_runs_its_own_code(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cluster" / "bench" / "peers"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").touch()
    (folder / "arriero_peer.py").write_text(f'print(\'{{"version": "other"}}\', flush=True)\ninput()\n{CONSTANT}')
    rows = rows_of(
        bench(*ENGINE, "--model", checkpoint, "--batch", "1", "--prompt-tokens", "8", "--prefill", "",
              "--beside", f"other={tmp_path}")
    )  # fmt: skip
    assert {row["contestant"]: row["p50_ms"] == 1000.0 for row in rows} == {"arriero": False, "other": True}


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_engine_bench_runs_routers_over_shards(checkpoint: Path, transport: str) -> None:
    rows = rows_of(
        bench(*ENGINE, "--model", checkpoint, "--batch", "2", "--prompt-tokens", "8", "--prefill", "", "--shards", "2",
              "--routers", "2", "--transport", transport)
    )  # fmt: skip
    (row,) = rows
    assert (row["shards"], row["routers"], row["transport"]) == (2, 2, transport)
    # Two routers, four steps each.
    assert row["num_samples"] == 8


def test_simulated_service_time_is_in_the_step_and_in_the_row(checkpoint: Path) -> None:
    rows = rows_of(
        bench(*ENGINE, "--model", checkpoint, "--batch", "1", "--prompt-tokens", "8", "--prefill", "", "--shards", "2",
              "--shard-latency-ms", "30")
    )  # fmt: skip
    # One token visits one expert in each of the four MoE layers.
    assert rows[0]["min_ms"] >= 4 * 30
    assert rows[0]["simulated_ms"] == 30


def test_dispatch_bench_has_a_row_for_each_transport_and_size(tmp_path: Path) -> None:
    rows = rows_of(bench("dispatch", "--shards", "2", "--rows", "1,5", "--samples", "60", "--json", "--out", tmp_path))
    assert {(row["transport"], row["rows"]) for row in rows} == set(product(("local", "shm", "tcp"), (1, 5)))
    for row in rows:
        assert row["shards"] == 2
        assert 0 < row["p50_us"] <= row["p99_us"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("engine", "--peers", "ollama"), "--peers must be of transformers, llama.cpp, vllm, got ollama"),
        (("engine", "--routers", "2"), "--routers needs --shards"),
        (("engine", "--shard-latency-ms", "1"), "--shard-latency-ms needs --shards"),
        (("dispatch", "--transports", "pigeon"), "transports must be of local, shm, tcp"),
        (("dispatch", "--row-bytes", "3"), "row-bytes must be a positive multiple of 2, got 3"),
        (("dispatch", "--rows", "0"), "must be at least 1, got 0"),
    ],
)
def test_a_wrong_flag_is_named(arguments: tuple[str, ...], message: str) -> None:
    completed = bench(*arguments)
    assert completed.returncode == 2
    assert message in completed.stderr


def test_a_child_that_does_not_answer_is_named() -> None:
    child = Child("sleepy", [sys.executable, "-c", "import time; time.sleep(100)"], environment={})
    try:
        child.tell({})
        with pytest.raises(ChildError, match=r"sleepy did not answer within 0\.1 s"):
            child.hear(0.1)
    finally:
        child.close()


def test_a_child_that_has_ended_is_named_with_its_status() -> None:
    child = Child("gone", [sys.executable, "-c", "raise SystemExit(3)"], environment={})
    try:
        with pytest.raises(ChildError, match="gone has ended, exit status 3"):
            child.hear(30)
    finally:
        child.close()


def test_a_paused_child_answers_only_when_it_is_resumed() -> None:
    child = Child("echo", [sys.executable, "-c", ECHO], environment={})
    try:
        child.tell({"n": 1})
        assert child.hear(30)["n"] == 1
        child.pause()
        child.tell({"n": 2})
        with pytest.raises(ChildError, match="did not answer"):
            child.hear(0.2)
        child.resume()
        assert child.hear(30)["n"] == 2
    finally:
        child.close()


def test_contestants_take_turns_and_a_failing_one_leaves_the_race() -> None:
    race = Race()
    children = [Child(name, [sys.executable, "-c", ECHO], environment={}) for name in ("a", "b")]
    try:
        for child in children:
            race.join(child.name, lambda child=child: Contestant([child], [], {"contestant": child.name}, version="1"))
        order: list[str] = []

        def act(contestant: Contestant, *, number: int) -> Timing:
            order.append(contestant.name)
            return contestant.ask({"error": "tired"} if (contestant.name, number) == ("b", 2) else {}, timeout_s=30)

        results = {contestant.name: timing.seconds for contestant, timing in race.rounds(4, act)}
        assert results == {"a": [1.0] * 4}
        assert sorted(order) == ["a"] * 4 + ["b"] * 3
        assert order[0] != order[2], "who begins changes"
        assert [row["absent"] for row in race.absences] == ["b: tired"]
    finally:
        for child in children:
            child.close()


def test_a_closed_child_leaves_no_process() -> None:
    child = Child("stubborn", [sys.executable, "-c", "import time\nwhile True: time.sleep(1)"], environment={})
    child.pause()
    started_at = time.monotonic()
    child.close()
    assert time.monotonic() - started_at < 30
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)
