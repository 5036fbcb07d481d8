"""Every dispatcher must give the bits of LocalDispatcher. Shapes: T tokens, D model, E experts, K top-k."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from expert_fleet import LAYERS, Fleet, ProcessShard, ThreadShard
from lane_rows import NUM_EXPERTS, Rows, random_rows, run

from experts.lane import LaneDispatcher
from experts.server import ServerLimits
from experts.transport.shm_region import NUM_ENTRIES


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True, kw_only=True)
class Shape:
    transport: str
    num_shards: int
    copies: int = 1
    dtype: torch.dtype = torch.float32
    hosting: type[ThreadShard | ProcessShard] = ThreadShard

    def __str__(self) -> str:
        dtype, hosting = str(self.dtype).removeprefix("torch."), self.hosting.__name__
        return f"{self.transport}-{self.num_shards}x{self.copies}-{dtype}-{hosting}"


BFLOAT16 = torch.bfloat16
SHAPES = [
    *(Shape(transport=name, num_shards=shards) for name in ("shm", "tcp") for shards in (1, 3)),
    *(Shape(transport=name, num_shards=2, dtype=BFLOAT16) for name in ("shm", "tcp", "mixed")),
    Shape(transport="shm", num_shards=5, copies=3),
    Shape(transport="tcp", num_shards=3, copies=2),
    Shape(transport="mixed", num_shards=5, copies=3),
    Shape(transport="shm-rung", num_shards=3, copies=2),
    Shape(transport="shm", num_shards=3, hosting=ProcessShard),
    Shape(transport="mixed", num_shards=2, copies=2, hosting=ProcessShard),
]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    shape: Shape = request.param
    with Fleet(
        num_shards=shape.num_shards,
        num_experts=NUM_EXPERTS,
        copies=shape.copies,
        hosting=shape.hosting,
        dtype=shape.dtype,
        transport=shape.transport,
    ) as made:
        yield made


@pytest.fixture
def lane(fleet: Fleet) -> Iterator[LaneDispatcher]:
    made = fleet.dispatcher()
    yield made
    assert made.lost == {}
    made.close()


def rows_for(fleet: Fleet, num_tokens: int, **how: Any) -> Rows:
    return random_rows(num_tokens, dtype=fleet.dtype, **how)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 64, 300])
def test_a_lane_gives_the_bits_of_a_function_call(
    fleet: Fleet, lane: LaneDispatcher, num_tokens: int, top_k: int
) -> None:
    rows = rows_for(fleet, num_tokens, top_k=top_k, seed=num_tokens)
    for step, layer in enumerate(LAYERS, start=1):
        lane.begin_step(step)
        torch.testing.assert_close(run(lane, rows, layer), run(fleet.oracle, rows, layer), rtol=0, atol=0)


def test_sixteen_thousand_skewed_tokens_come_back_in_place(fleet: Fleet, lane: LaneDispatcher) -> None:
    rows = rows_for(fleet, 16_384, top_k=2, skewed=True)
    assert torch.equal(run(lane, rows), run(fleet.oracle, rows))


def test_bits_do_not_depend_on_the_order_of_a_tokens_experts(fleet: Fleet, lane: LaneDispatcher) -> None:
    rows = rows_for(fleet, 50, top_k=3)
    turned = Rows(x_TD=rows.x_TD, ids_TK=rows.ids_TK.flip(1), scores_TK=rows.scores_TK.flip(1))
    assert torch.equal(run(lane, turned), run(fleet.oracle, rows))


def test_a_row_has_the_bits_it_has_alone(fleet: Fleet, lane: LaneDispatcher) -> None:
    rows = rows_for(fleet, 40, top_k=2)
    together_TD = run(lane, rows)
    for token in (0, 17, 39):
        pick = slice(token, token + 1)
        alone = Rows(x_TD=rows.x_TD[pick], ids_TK=rows.ids_TK[pick], scores_TK=rows.scores_TK[pick])
        assert torch.equal(run(lane, alone), together_TD[pick])


def test_several_dispatches_of_a_step_may_be_open_and_combined_in_any_order(fleet: Fleet, lane: LaneDispatcher) -> None:
    batches = [rows_for(fleet, 30 + seed, seed=seed) for seed in range(3)]
    handles = [lane.dispatch(LAYERS[0], rows.x_TD, rows.ids_TK, rows.scores_TK) for rows in batches]
    for rows, handle in reversed(list(zip(batches, handles, strict=True))):
        assert torch.equal(lane.combine(handle).y_TD, run(fleet.oracle, rows))


def test_many_lanes_at_once_each_get_their_own_rows(fleet: Fleet) -> None:
    wrong: list[str] = []

    def drive(index: int) -> None:
        lane = fleet.dispatcher(f"lane-{index}")
        for step in range(1, 16):
            lane.begin_step(step)
            for layer in LAYERS:
                rows = rows_for(fleet, 1 + (index * 37 + step * 11) % 90, top_k=2, seed=index * 100 + step)
                if not torch.equal(run(lane, rows, layer), run(oracles[index], rows, layer)):
                    wrong.append(f"lane {index}, step {step}, layer {layer}")
        if lane.lost:
            wrong.append(str(lane.lost))

    oracles = [fleet.oracle] * 4
    threads = [threading.Thread(target=drive, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []


def test_an_abandoned_handles_answer_is_dropped(fleet: Fleet, lane: LaneDispatcher) -> None:
    old, new = rows_for(fleet, 64, seed=1), rows_for(fleet, 64, seed=2)
    handle = lane.dispatch(LAYERS[0], old.x_TD, old.ids_TK, old.scores_TK)
    lane.begin_step(1)
    assert torch.equal(run(lane, new), run(fleet.oracle, new))
    with pytest.raises(ValueError, match="step 0, layer 1: step 1 has begun"):
        lane.combine(handle)


def test_more_dispatches_may_be_open_than_a_region_has_entries(fleet: Fleet, lane: LaneDispatcher) -> None:
    batches = [rows_for(fleet, 3, seed=seed) for seed in range(NUM_ENTRIES + 10)]
    handles = [lane.dispatch(LAYERS[0], rows.x_TD, rows.ids_TK, rows.scores_TK) for rows in batches]
    for rows, handle in zip(batches, handles, strict=True):
        assert torch.equal(lane.combine(handle).y_TD, run(fleet.oracle, rows))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_bfloat16_rows_are_summed_in_float32_and_cast_once(transport: str) -> None:
    rows = random_rows(33, top_k=4, dtype=torch.bfloat16)
    with Fleet(num_shards=3, num_experts=NUM_EXPERTS, dtype=torch.bfloat16, transport=transport) as fleet:
        got_TD = run(fleet.dispatcher(), rows)
        assert torch.equal(got_TD, run(fleet.oracle, rows))
        singles_TKD = torch.stack(
            [
                run(fleet.oracle, Rows(x_TD=rows.x_TD, ids_TK=ids.unsqueeze(1), scores_TK=scores.unsqueeze(1)))
                for ids, scores in zip(
                    rows.ids_TK.sort(1).values.unbind(1),
                    rows.scores_TK.gather(1, rows.ids_TK.argsort(1)).unbind(1),
                    strict=True,
                )
            ],
            dim=1,
        )
    assert torch.equal(got_TD, singles_TKD.float().sum(1).bfloat16())


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_shards_without_rows_hear_nothing(transport: str) -> None:
    with Fleet(num_shards=4, num_experts=8, transport=transport) as fleet:
        lane = fleet.dispatcher()
        rows = random_rows(1)
        run(lane, rows)
        assert sorted(shard.server.stats().progress for shard in fleet.shards.values()) == [0, 0, 0, 1]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_message_larger_than_the_way_holds_does_not_deadlock_against_its_answer(transport: str) -> None:
    rows = random_rows(60_000, num_experts=2)
    # The shard takes no second message before its first answer has left, and that does not fit the sockets; nor do
    # both messages fit a region.
    limits = ServerLimits(max_unanswered=1)
    with Fleet(num_shards=1, num_experts=2, limits=limits, transport=transport) as fleet:
        lane = fleet.dispatcher()
        first = lane.dispatch(LAYERS[0], rows.x_TD, rows.ids_TK, rows.scores_TK)
        second = lane.dispatch(LAYERS[0], rows.x_TD, rows.ids_TK, rows.scores_TK)
        wanted_TD = run(fleet.oracle, rows)
        assert torch.equal(lane.combine(second).y_TD, wanted_TD)
        assert torch.equal(lane.combine(first).y_TD, wanted_TD)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_rows_that_do_not_fit_the_shards_are_the_callers_mistake(transport: str) -> None:
    with Fleet(num_shards=2, transport=transport) as fleet:
        lane = fleet.dispatcher()
        good = random_rows(3)
        with pytest.raises(ValueError, match="bfloat16"):
            lane.dispatch(LAYERS[0], good.x_TD.bfloat16(), good.ids_TK, good.scores_TK)
        with pytest.raises(ValueError, match="expert 99 of layer 1"):
            lane.dispatch(LAYERS[0], good.x_TD, torch.full_like(good.ids_TK, 99), good.scores_TK)
        many = random_rows(65537)
        with pytest.raises(ValueError, match="65537 rows"):
            lane.dispatch(LAYERS[0], many.x_TD, many.ids_TK, many.scores_TK)
        with pytest.raises(ValueError, match="step must be above 0"):
            lane.begin_step(0)
        assert torch.equal(run(lane, good), run(fleet.oracle, good))
