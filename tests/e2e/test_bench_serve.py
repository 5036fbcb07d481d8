"""`arriero bench serve` with a service of its own: real gRPC, real HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.checkpoints.presets import create_checkpoint

pytestmark = pytest.mark.cluster


def test_every_request_is_answered_over_both_protocols(tmp_path: Path) -> None:
    checkpoint = create_checkpoint("tiny-maverick", tmp_path / "tiny")
    command = [
        sys.executable, "-m", "cluster.cli", "bench", "serve", "--model", str(checkpoint), "--serve-args", "--shards 0",
        "--rate", "20", "--requests", "5", "--prompt-tokens", "8", "--max-tokens", "6", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["protocol"] for row in rows] == ["grpc", "http"]
    for row in rows:
        assert (row["requests"], row["errors"], row["num_samples"]) == (5, 0, 5), row
        assert row["tokens_per_s"] > 0
        assert 0 < row["ttft_p50_ms"] <= row["ttft_p99_ms"]
