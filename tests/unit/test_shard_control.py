"""A shard that is given further slots, and loses others, while it computes."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence

import pytest
import torch

from experts.epoch import Epoch, ShardAddress
from experts.linear import pack_linear
from experts.message import Refusal
from experts.mlp import Mlp
from experts.placement import ExpertPlacement, ShardId, Slot, WeightSlot
from experts.progress import Progress
from experts.shard import Shard
from experts.shard_control import PreparationEndedError, ShardControl, StaleTermError

D = 8
A = ShardId("a")
FIRST, SECOND, THIRD = (Slot(1, expert) for expert in range(3))
TERM = 3


def mlp(slot: Slot) -> Mlp:
    generator = torch.Generator().manual_seed(slot.expert)
    return Mlp(
        gate=pack_linear(torch.randn(D, D, generator=generator)),
        up=pack_linear(torch.randn(D, D, generator=generator)),
        down=pack_linear(torch.randn(D, D, generator=generator)),
    )


def epoch(number: int, *slots: Slot, weights_version: int = 0) -> Epoch:
    address = ShardAddress(shard_id=A, node_id="n", host="h", port=1)
    placement = ExpertPlacement(slots_by_shard={A: slots})
    return Epoch(number=number, weights_version=weights_version, shards=(address,), placement=placement)


def held(slot: Slot, weights_version: int = 0) -> WeightSlot:
    return WeightSlot(weights_version, *slot)


class Loader:
    """Loads in the thread it is called from; fails or waits when told to."""

    def __init__(self) -> None:
        self.loaded: list[Slot] = []
        self.models: list[str | None] = []
        self.error: Exception | None = None
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.has_begun = threading.Event()
        self.niceness = 0

    def __call__(self, slots: Sequence[Slot], progress: Progress, model: str | None) -> Mapping[Slot, Mlp]:
        self.models.append(model)
        self.niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        mlps = {}
        for slot in slots:
            self.has_begun.set()
            assert self.may_go_on.wait(20)
            if self.error is not None:
                raise self.error
            mlps[slot] = mlp(slot)
            self.loaded.append(slot)
            progress(len(mlps), len(slots))
        return mlps


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def shard() -> Shard:
    torch.set_num_threads(1)
    made = Shard(shard_id=A, slots={FIRST: mlp(FIRST)}, hidden_size=D, dtype=torch.float32)
    made.serve_epoch(epoch(1, FIRST))
    return made


@pytest.fixture
def control(shard: Shard, loader: Loader) -> ShardControl:
    return ShardControl(shard, loader)


def refusal(shard: Shard, number: int, slot: Slot, weights_version: int = 0) -> Refusal | None:
    return shard.refusal(epoch=number, weights_version=weights_version, slots=[slot])


def test_a_prepared_epoch_has_its_further_slots_and_the_old_one_does_not(
    shard: Shard, control: ShardControl, loader: Loader
) -> None:
    control.prepare(TERM, epoch(2, FIRST, SECOND))
    control.prepare(TERM, epoch(2, FIRST, SECOND))
    assert loader.loaded == [SECOND]
    assert control.num_loaded == 1
    assert shard.epochs == (1, 2)
    assert refusal(shard, 2, SECOND) is None
    assert refusal(shard, 1, SECOND) is Refusal.NO_SUCH_SLOT
    assert torch.equal(shard.apply_expert(held(SECOND), torch.ones(1, D)), mlp(SECOND)(torch.ones(1, D)))
    assert shard.load.snapshot() == [(1, 0, 0), (1, 1, 1)]


def test_slots_are_loaded_behind_whatever_else_the_process_does(control: ShardControl, loader: Loader) -> None:
    control.prepare(TERM, epoch(2, SECOND))
    assert loader.niceness == os.getpriority(os.PRIO_PROCESS, 0) + 10


def test_with_its_epoch_go_the_slots_that_no_other_one_needs_but_not_while_their_rows_wait(
    shard: Shard, control: ShardControl
) -> None:
    control.prepare(TERM, epoch(2, SECOND))
    control.retire(TERM, 1)
    assert shard.slots == (held(SECOND),)
    assert refusal(shard, 1, FIRST) is Refusal.STALE_EPOCH
    shard.free_retired(in_use=[held(FIRST)])
    assert shard.apply_expert(held(FIRST), torch.ones(1, D)).shape == (1, D)
    shard.free_retired(in_use=[])
    assert not shard.has_retired
    with pytest.raises(ValueError, match="not loaded"):
        shard.apply_expert(held(FIRST), torch.ones(1, D))
    assert shard.load.snapshot()[0] == (1, 0, 1)


def test_a_slot_that_was_to_be_freed_is_loaded_again_when_an_epoch_needs_it(
    shard: Shard, control: ShardControl, loader: Loader
) -> None:
    control.prepare(TERM, epoch(2, SECOND))
    control.retire(TERM, 1)
    control.prepare(TERM, epoch(3, FIRST, SECOND))
    shard.free_retired(in_use=[])
    assert loader.loaded == [SECOND, FIRST]
    assert shard.apply_expert(held(FIRST), torch.ones(1, D)).shape == (1, D)


def test_a_shard_that_loses_its_last_epoch_keeps_its_weights(
    shard: Shard, control: ShardControl, loader: Loader
) -> None:
    control.retire(TERM, 1)
    shard.free_retired(in_use=[])
    control.prepare(TERM, epoch(4, FIRST))
    assert loader.loaded == []
    assert shard.epochs == (4,)


def test_an_aborted_preparation_stops_loading_and_leaves_nothing(
    shard: Shard, control: ShardControl, loader: Loader
) -> None:
    loader.may_go_on.clear()
    failure: list[BaseException] = []

    def prepare() -> None:
        with pytest.raises(PreparationEndedError, match="epoch 2 was retired while a prepared it") as caught:
            control.prepare(TERM, epoch(2, SECOND, THIRD))
        failure.append(caught.value)

    thread = threading.Thread(target=prepare)
    thread.start()
    assert loader.has_begun.wait(20)
    control.retire(TERM, 2)
    loader.may_go_on.set()
    thread.join(20)
    assert failure
    assert loader.loaded == [SECOND], "it stops at the next slot"
    assert (shard.epochs, shard.slots) == ((1,), (held(FIRST),))
    with pytest.raises(PreparationEndedError):
        control.prepare(TERM, epoch(2, FIRST))


def test_an_epoch_that_was_prepared_and_then_aborted_gives_its_slots_back(shard: Shard, control: ShardControl) -> None:
    control.prepare(TERM, epoch(2, FIRST, SECOND))
    control.retire(TERM, 2)
    shard.free_retired(in_use=[])
    assert (shard.epochs, shard.slots) == ((1,), (held(FIRST),))


def test_what_cannot_be_loaded_is_told_and_changes_nothing(shard: Shard, control: ShardControl, loader: Loader) -> None:
    loader.error = OSError("model.safetensors: truncated")
    with pytest.raises(OSError, match="truncated"):
        control.prepare(TERM, epoch(2, FIRST, SECOND))
    assert (shard.epochs, shard.slots) == ((1,), (held(FIRST),))
    loader.error = None
    control.prepare(TERM, epoch(3, FIRST, SECOND))
    assert shard.epochs == (1, 3)


def test_a_controller_of_an_earlier_term_is_refused(shard: Shard, control: ShardControl) -> None:
    control.prepare(TERM, epoch(2, FIRST))
    with pytest.raises(StaleTermError, match="term 2 is over: a has heard of term 3"):
        control.prepare(TERM - 1, epoch(3, FIRST))
    with pytest.raises(StaleTermError):
        control.retire(TERM - 1, 1)
    control.retire(TERM + 1, 1)
    assert shard.epochs == (2,)


def test_two_versions_of_a_slot_lie_side_by_side_until_the_old_one_is_retired(
    shard: Shard, control: ShardControl, loader: Loader
) -> None:
    control.prepare(TERM, epoch(2, FIRST, weights_version=1), "the new model")
    assert (loader.loaded, loader.models) == ([FIRST], ["the new model"])
    assert shard.slots == (held(FIRST), held(FIRST, 1))
    assert shard.weights_versions == {1: 0, 2: 1}
    assert refusal(shard, 1, FIRST) is refusal(shard, 2, FIRST, weights_version=1) is None
    assert refusal(shard, 2, FIRST) is Refusal.OTHER_WEIGHTS_VERSION
    control.retire(TERM, 1)
    assert refusal(shard, 1, FIRST) is Refusal.STALE_EPOCH
    shard.free_retired(in_use=[])
    assert shard.slots == (held(FIRST, 1),)
    with pytest.raises(ValueError, match="is not loaded"):
        shard.apply_expert(held(FIRST), torch.ones(1, D))


def test_each_version_may_go_on_to_its_next_epoch_while_the_other_one_serves(
    shard: Shard, control: ShardControl
) -> None:
    control.prepare(TERM, epoch(2, FIRST, weights_version=1))
    control.prepare(TERM, epoch(3, FIRST, SECOND))
    control.prepare(TERM, epoch(4, FIRST, SECOND, weights_version=1))
    assert shard.weights_versions == {1: 0, 2: 1, 3: 0, 4: 1}
    with pytest.raises(ValueError, match=r"epoch 5 would be one too many beside \[1, 3\]"):
        control.prepare(TERM, epoch(5, FIRST))
    with pytest.raises(ValueError, match="epoch 3 is of weights version 0, not 1"):
        control.prepare(TERM, epoch(3, FIRST, weights_version=1))


def test_giving_a_new_version_up_frees_its_slots_alone(shard: Shard, control: ShardControl) -> None:
    control.prepare(TERM, epoch(2, FIRST, SECOND, weights_version=1))
    control.retire(TERM, 2)
    shard.free_retired(in_use=[held(SECOND, 1)])
    assert shard.slots == (held(FIRST),), "what rows still wait for is kept, but no longer counts"
    shard.free_retired(in_use=[])
    assert shard.apply_expert(held(FIRST), torch.ones(1, D)).shape == (1, D)
