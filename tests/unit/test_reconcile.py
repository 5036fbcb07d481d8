from cluster.config import ServiceConfig
from cluster.control.reconcile import (
    AppWatch,
    ShardPlan,
    further_shards,
    lineage,
    plan_shards,
    shard_changes,
    shard_ids,
    successor,
)
from experts.placement import ShardId

A, B, C = ShardId("a"), ShardId("b"), ShardId("c")


def test_shards_of_two_starts_never_share_a_name() -> None:
    assert not set(shard_ids(3, "x")) & set(shard_ids(3, "y"))
    assert len(set(shard_ids(3, "x"))) == 3


def test_a_replacement_is_of_the_same_lineage_under_another_name() -> None:
    first, _second = shard_ids(2, "x")
    after = successor(first, "y")
    assert after != first
    assert lineage(after) == lineage(first) == "shard-0"


def test_further_shards_take_free_lineages() -> None:
    known = [ShardId("shard-0-x"), ShardId("shard-2-y")]
    assert further_shards(known, 3, "z") == ("shard-1-z", "shard-3-z", "shard-4-z")


def test_a_first_start_creates_every_shard() -> None:
    assert plan_shards(desired=[A, B], living=[]) == ShardPlan(adopt=(), create=(A, B))


def test_a_controller_reborn_while_shards_load_adopts_those_there_are() -> None:
    assert plan_shards(desired=[A, B, C], living={B}) == ShardPlan(adopt=(B,), create=(A, C))


def test_changes_of_the_front_leave_the_shards_alone() -> None:
    running = ServiceConfig(model="m")
    assert (
        shard_changes(
            running,
            ServiceConfig(model="m", routers=3, max_routers=5, router_kv_target=0.5, max_model_len=99, seed=1),
            "m",
        )
        == ()
    )


def test_changes_that_concern_shards_are_named() -> None:
    running = ServiceConfig(model="m")
    wanted = ServiceConfig(model="n", shards=3, dtype="float32")
    assert shard_changes(running, wanted, "m") == ("dtype", "model", "shards")


def test_neither_the_model_of_the_start_nor_the_one_that_an_update_put_in_its_place_is_a_change() -> None:
    running = ServiceConfig(model="m")
    assert shard_changes(running, ServiceConfig(model="m"), "updated") == ()
    assert shard_changes(running, ServiceConfig(model="updated"), "updated") == ()
    assert shard_changes(running, ServiceConfig(model="another"), "updated") == ("model",)


def test_an_application_gone_for_long_enough_is_gone() -> None:
    watch = AppWatch(gone_after_s=30.0)
    assert not watch.note(present=True, now_s=0.0)
    assert not watch.note(present=False, now_s=10.0)
    assert not watch.note(present=False, now_s=39.0)
    assert watch.note(present=False, now_s=40.0)


def test_an_application_that_comes_back_starts_the_wait_anew() -> None:
    watch = AppWatch(gone_after_s=30.0)
    watch.note(present=False, now_s=0.0)
    watch.note(present=True, now_s=20.0)
    assert not watch.note(present=False, now_s=40.0)
    assert watch.note(present=False, now_s=70.0)


def test_a_serve_that_does_not_answer_proves_nothing() -> None:
    watch = AppWatch(gone_after_s=30.0)
    watch.note(present=False, now_s=0.0)
    assert not watch.note(present=None, now_s=100.0)
    assert watch.note(present=False, now_s=101.0)
