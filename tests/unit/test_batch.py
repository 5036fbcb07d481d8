"""What a step's batch is made of."""

from __future__ import annotations

import pytest
import torch
from kernel_choice import KERNELS, kernels
from tiny_models import SCOUT

from router.batch import Batch, InputEmbeddings, SequenceSlice, StepPlan, build_batch
from router.config import ModelConfig
from router.kv_cache import NULL_BLOCK
from router.tile_plan import TilePlan

CONFIG = ModelConfig.from_checkpoint_config(SCOUT | {"model_type": "llama4_text", "attention_chunk_size": 32})
BLOCK = 16
BLOCKS = list(range(1, 20))


def slice_of(count: int, start: int, **changes: object) -> SequenceSlice:
    fields = {"global_blocks": BLOCKS, "local_blocks": BLOCKS, "logits_from": count - 1}
    return SequenceSlice(token_ids=list(range(count)), start=start, **(fields | changes))  # type: ignore[arg-type]


def build(*slices: SequenceSlice) -> Batch:
    return build_batch(slices, CONFIG, BLOCK, torch.device("cpu"))


def test_positions_count_from_the_start_and_rope_positions_from_the_chunk() -> None:
    batch = build(slice_of(5, 30), slice_of(1, 64))
    assert batch.num_tokens == 6
    assert batch.token_ids_T.tolist() == [0, 1, 2, 3, 4, 0]
    assert batch.positions_T.tolist() == [30, 31, 32, 33, 34, 64]
    assert batch.rope_positions_T.tolist() == [30, 31, 0, 1, 2, 0]


def num_tiles(plan: StepPlan) -> int:
    if isinstance(plan, TilePlan):
        return len(plan.tiles_N4)
    return sum(batch.num_tiles for batch in plan.batches)


def blocks_read(plan: StepPlan) -> set[int]:
    if isinstance(plan, TilePlan):
        return set(plan.tables.tolist())
    splits = [split for batch in plan.batches for split in batch.splits]
    return {row // CONFIG.num_key_value_heads for split in splits for row in split.block_rows.tolist()} - {NULL_BLOCK}


@pytest.mark.parametrize("choice", KERNELS)
def test_local_queries_are_split_at_chunk_boundaries_and_global_ones_need_not_be(choice: str) -> None:
    with kernels(choice):
        batch = build(slice_of(10, 30))
        assert (num_tiles(batch.local_plan), num_tiles(batch.global_plan)) == (2, 1)
        assert num_tiles(build(slice_of(40, 30)).local_plan) == (4 if choice == "native" else 3)


@pytest.mark.parametrize("choice", KERNELS)
def test_local_attention_reads_no_block_before_its_chunk(choice: str) -> None:
    freed = [0, 0, 0, 0, *BLOCKS]
    with kernels(choice):
        assert blocks_read(build(slice_of(5, 70, local_blocks=freed)).local_plan) == {freed[4]}


def test_a_token_without_a_block_is_a_mistake_of_the_engine() -> None:
    with pytest.raises(AssertionError, match="no local block"):
        build(slice_of(5, 70, local_blocks=[1, 2, 3, 4, 0]))


def test_logits_are_wanted_from_where_the_slice_says() -> None:
    batch = build(slice_of(5, 0, logits_from=2), slice_of(3, 0, logits_from=3), slice_of(4, 0))
    assert batch.logit_rows_L.tolist() == [2, 3, 4, 11]


def test_given_embeddings_keep_their_rows_behind_other_slices() -> None:
    given = InputEmbeddings(torch.tensor([0, 2]), torch.ones(2, CONFIG.hidden_size))
    batch = build(slice_of(5, 0), slice_of(3, 0, embeddings=given))
    assert batch.embeddings is not None
    assert batch.embeddings.rows_M.tolist() == [5, 7]
    assert build(slice_of(5, 0)).embeddings is None
