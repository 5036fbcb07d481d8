from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import pytest
import torch

from experts import speed_probe
from experts.shard import Shard
from experts.shard_speed import TILE_ROWS
from experts.speed_probe import measure_speed

FLOPS_PER_ROW = 3600
READ_S, ROW_S = 4e-3, 1e-4
NUM_BYTES = 2400


@dataclass
class FakeTime:
    """Passes only while an expert computes; the first time each of them takes twice as long."""

    now_s: float = 0.0

    def perf_counter(self) -> float:
        return self.now_s


@dataclass
class FakeExpert:
    clock: FakeTime
    num_bytes: int = NUM_BYTES
    rows: list[int] = field(default_factory=list)

    def __call__(self, x_RD: torch.Tensor) -> torch.Tensor:
        is_first = x_RD.shape[0] not in self.rows
        self.rows.append(x_RD.shape[0])
        self.clock.now_s += (1 + is_first) * max(READ_S, x_RD.shape[0] * ROW_S)
        return x_RD


@dataclass
class FakeShard:
    experts: tuple[FakeExpert, ...]
    hidden_size: int = 8
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@pytest.mark.parametrize("num_experts", [1, 3, 20])
def test_speed_is_what_a_row_and_a_tile_take_once_they_are_warm(
    num_experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeTime()
    monkeypatch.setattr(speed_probe, "time", clock)
    shard = FakeShard(tuple(FakeExpert(clock) for _ in range(num_experts)))
    speed = measure_speed(cast("Shard", shard), flops_per_row=FLOPS_PER_ROW)
    assert speed is not None
    assert speed.bytes_per_s == pytest.approx(NUM_BYTES / READ_S)
    assert speed.flops_per_s == pytest.approx(FLOPS_PER_ROW / ROW_S)
    assert shard.experts[0].rows.count(TILE_ROWS) == 3
    assert sum(1 in expert.rows for expert in shard.experts) == min(8, num_experts)


def test_a_shard_without_experts_has_no_speed() -> None:
    assert measure_speed(cast("Shard", FakeShard(())), flops_per_row=FLOPS_PER_ROW) is None
