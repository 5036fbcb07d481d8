from __future__ import annotations

import torch

from experts.linear import pack_linear
from experts.load import ExpertLoad
from experts.mlp import Mlp
from experts.placement import ShardId, Slot
from experts.shard import Shard

D, F = 8, 16


def shard(*experts: int) -> Shard:
    mlps = {
        Slot(1, expert): Mlp(
            gate=pack_linear(torch.rand(F, D)), up=pack_linear(torch.rand(F, D)), down=pack_linear(torch.rand(D, F))
        )
        for expert in experts
    }
    return Shard(shard_id=ShardId("s"), slots=mlps, hidden_size=D, dtype=torch.float32)


def test_an_activation_is_a_computation_with_rows_however_many() -> None:
    load = ExpertLoad([Slot(3, 1), Slot(1, 0)])
    for num_rows in (5, 0, 200):
        load.add(Slot(3, 1), num_rows)
    assert load.snapshot() == [(1, 0, 0), (3, 1, 205)]
    assert load.activations() == [(1, 0, 0), (3, 1, 2)]


def test_a_shard_counts_what_it_computes() -> None:
    counted = shard(0, 1, 2)
    counted.apply(1, torch.rand(7, D), [(0, 3), (1, 0), (2, 4)])
    counted.apply(1, torch.rand(1, D), [(0, 1)])
    assert counted.load.snapshot() == [(1, 0, 4), (1, 1, 0), (1, 2, 4)]
    assert counted.load.activations() == [(1, 0, 2), (1, 1, 0), (1, 2, 1)]
