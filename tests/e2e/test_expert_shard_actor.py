"""The shard as a Ray actor: loads its slots from a checkpoint, serves lanes, drains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import save_file

from cluster.control.shard_work import ShardWork
from experts.actor import ExpertShardActor
from experts.checkpoint import Checkpoint
from experts.dispatch import LocalDispatcher
from experts.epoch import Epoch
from experts.expert_shape import ExpertShape
from experts.lane import LaneDispatcher
from experts.placement import ShardId, place
from experts.shard_loader import load_shard
from experts.shard_spec import ShardSpec

pytestmark = pytest.mark.cluster

E, D, H = 4, 64, 32
LAYERS = (1, 3)
SECRET = b"a secret of the tests"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in LAYERS:
        prefix = f"model.layers.{layer}.feed_forward.experts"
        tensors[f"{prefix}.gate_up_proj"] = torch.randn(E, D, 2 * H, generator=generator) / 8
        tensors[f"{prefix}.down_proj"] = torch.randn(E, H, D, generator=generator) / 6
    save_file(tensors, folder / "model.safetensors")
    # Sizes are the controller's to tell: transformers leaves out of a config.json what equals its defaults.
    (folder / "config.json").write_text(json.dumps({"model_type": "llama4_text"}))
    return folder


def spec(shard_id: str, model: Path, slots: tuple[object, ...]) -> ShardSpec:
    return ShardSpec(
        shard_id=ShardId(shard_id),
        model=str(model),
        slots=slots,  # type: ignore[arg-type]
        shape=ExpertShape(hidden_size=D, intermediate_size=H, num_experts=E),
        dtype="float32",
        device="cpu",
        num_threads=1,
        secret=SECRET,
        weights_version=1,
    )


@pytest.mark.usefixtures("cluster")
def test_shard_actors_load_serve_count_and_drain(model: Path) -> None:
    torch.set_num_threads(1)
    ids = [ShardId("s0"), ShardId("s1"), ShardId("s2")]
    placement = place(moe_layers=LAYERS, num_experts=E, shard_ids=ids)
    actor_class = ray.remote(ExpertShardActor).options(num_cpus=0)  # type: ignore[attr-defined]
    actors = [actor_class.remote(spec(shard_id, model, placement.slots_by_shard[shard_id])) for shard_id in ids]
    addresses = tuple(ray.get([actor.address.remote() for actor in actors], timeout=60))
    epoch = Epoch(number=4, weights_version=1, shards=addresses, placement=placement)
    ray.get([actor.prepare.remote(1, epoch.to_dict(), str(model)) for actor in actors], timeout=10)

    lane = LaneDispatcher(lane_id="router-0", epoch=epoch, secret=SECRET, timeout_s=10)
    oracle = LocalDispatcher(load_shard(spec("oracle", model, placement.slots)))
    x_TD, (scores_TK, ids_TK) = torch.randn(20, D), torch.randn(20, E).topk(2, dim=1)
    for step, layer in enumerate(LAYERS):
        lane.begin_step(step)
        answers = [
            dispatcher.combine(dispatcher.dispatch(layer, x_TD, ids_TK, torch.sigmoid(scores_TK)))
            for dispatcher in (lane, oracle)
        ]
        assert answers[0].missing_T is None
        assert torch.equal(answers[0].y_TD, answers[1].y_TD)

    stats = ray.get([actor.stats.remote() for actor in actors], timeout=10)
    assert len({one["pid"] for one in stats}) == 3
    assert sorted(tuple(slot) for one in stats for slot in one["slots"]) == list(placement.slots)
    assert sum(rows for one in stats for _layer, _expert, rows in one["load"]) == 2 * 20 * 2
    assert [one["epochs"] for one in stats] == [[4]] * 3
    work = [ShardWork.from_stats(one) for one in stats]
    assert sum(traffic.rows for one in work for traffic in one.by_slot.values()) == 2 * 20 * 2
    activated = len(LAYERS) * len(set(ids_TK.flatten().tolist()))
    assert sum(traffic.activations for one in work for traffic in one.by_slot.values()) == activated
    assert all(one.speed is not None and one.busy_s > 0 for one in work)

    ray.get([actor.drain.remote() for actor in actors], timeout=10)
    assert ray.get([actor.wait_closed.remote(10.0) for actor in actors], timeout=20) == [True] * 3
    lane.begin_step(9)
    combined = lane.combine(lane.dispatch(1, x_TD, ids_TK, torch.sigmoid(scores_TK)))
    assert combined.missing_T is not None
    assert combined.missing_T.all()
    assert set(lane.lost) == set(ids)
    lane.close()


def test_a_shard_of_a_nested_checkpoint_reads_the_text_part(model: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(model)
    names = checkpoint.names()
    save_file({f"language_model.{name}": checkpoint.read(name) for name in names}, tmp_path / "model.safetensors")
    config = {"model_type": "llama4", "text_config": json.loads((model / "config.json").read_text())}
    (tmp_path / "config.json").write_text(json.dumps(config))
    slots = place(moe_layers=LAYERS, num_experts=E, shard_ids=[ShardId("s")]).slots
    x_RD = torch.randn(3, D)
    flat, nested = (load_shard(spec("s", folder, slots)) for folder in (model, tmp_path))
    assert torch.equal(flat.apply(1, x_RD, [(2, 3)]), nested.apply(1, x_RD, [(2, 3)]))


def test_an_unknown_dtype_is_named(model: Path) -> None:
    wrong = ShardSpec(
        shard_id=ShardId("s"),
        model=str(model),
        slots=(),
        shape=ExpertShape(hidden_size=D, intermediate_size=H, num_experts=E),
        dtype="float8",
        device="cpu",
        num_threads=1,
        secret=SECRET,
        weights_version=1,
    )
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'float8'"):
        load_shard(wrong)
