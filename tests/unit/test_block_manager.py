"""Blocks: who holds them, what is found again, and that the integrity check sees what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from router.block_geometry import BlockGeometry
from router.block_manager import BlockManager
from router.block_pool import BlockPool
from router.messages import GenerateRequest, MissingExpertPolicy
from router.prefix_cache.block_hash import BlockHash, root_hash
from router.sampling_params import SamplingParams
from router.sampling_state import SamplingState
from router.sequence import Sequence

HASHES = [BlockHash(bytes([index]) * 32) for index in range(8)]


def make_manager(*, num_global: int = 20, num_local: int = 20, chunk_size: int | None = 8) -> BlockManager:
    geometry = BlockGeometry(block_size=4, attention_chunk_size=chunk_size)
    return BlockManager(geometry=geometry, num_global_blocks=num_global + 1, num_local_blocks=num_local + 1)


def make_sequence(num_tokens: int, *, salt: str = "", weights_version: int = 0, first_token: int = 5) -> Sequence:
    prompt_ids = [first_token, *range(1, num_tokens)]
    params = SamplingParams(temperature=0.0)
    sampling = SamplingState(
        params, prompt_ids=prompt_ids, output_ids=[], eos_token_ids=[], vocab_size=100, device=torch.device("cpu")
    )
    return Sequence(
        request=GenerateRequest(request_id="r", prompt_ids=prompt_ids, params=params),
        missing_expert_policy=MissingExpertPolicy.FAIL,
        root_hash=root_hash(weights_version=weights_version, cache_salt=salt),
        max_total_tokens=100,
        sampling=sampling,
        token_ids=list(prompt_ids),
    )


def compute(manager: BlockManager, sequence: Sequence, num_tokens: int) -> None:
    assert manager.num_tokens_that_fit(sequence, num_tokens) == num_tokens
    manager.allocate(sequence, num_tokens)
    manager.advance(sequence, num_tokens)
    manager.check_integrity([sequence])


# One pool


def test_a_pool_never_hands_out_the_null_block() -> None:
    pool = BlockPool(4)
    assert {pool.allocate() for _ in range(3)} == {1, 2, 3}
    assert pool.num_free == 0


def test_a_released_block_is_found_under_its_hash_until_it_is_evicted() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(), pool.allocate()
    pool.publish(first, HASHES[0])
    pool.publish(second, HASHES[1])
    pool.release(second)
    pool.release(first)
    assert pool.find(HASHES[1]) == second
    assert pool.allocate() == second, "the longest idle goes first"
    assert pool.find(HASHES[1]) is None
    pool.hold(first)
    assert pool.num_free == 0
    pool.check_integrity(Counter([first, second]))


def test_a_hit_makes_a_block_young_again() -> None:
    pool = BlockPool(3)
    blocks = [pool.allocate(), pool.allocate()]
    for block_id, block_hash in zip(blocks, HASHES, strict=False):
        pool.publish(block_id, block_hash)
        pool.release(block_id)
    pool.hold(blocks[0])
    pool.release(blocks[0])
    assert pool.allocate() == blocks[1]


def test_blank_blocks_are_used_before_idle_ones() -> None:
    pool = BlockPool(3)
    published, plain = pool.allocate(), pool.allocate()
    pool.publish(published, HASHES[0])
    pool.release(published)
    pool.release(plain)
    assert pool.allocate() == plain


def test_the_second_block_of_a_hash_stays_private() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(), pool.allocate()
    pool.publish(first, HASHES[0])
    pool.publish(second, HASHES[0])
    assert pool.find(HASHES[0]) == first
    pool.release(second)
    pool.check_integrity(Counter([first]))
    assert pool.allocate() == second


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_a_pool_without_a_usable_block_is_refused(num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"not {num_blocks}"):
        BlockPool(num_blocks)


@pytest.mark.parametrize(("block_size", "message"), [(0, "at least 1, not 0"), (3, "3 does not divide .* 8")])
def test_sizes_that_cannot_work_are_refused(block_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockGeometry(block_size=block_size, attention_chunk_size=8)


# Two groups


def test_local_blocks_follow_the_chunk() -> None:
    """llama4.md §2.2: with n tokens computed, floor(n / C) * C are no longer needed."""
    manager, sequence = make_manager(), make_sequence(40)
    kept = []
    for _ in range(18):
        compute(manager, sequence, 1)
        kept.append(sum(block_id != 0 for block_id in sequence.local_blocks))
    assert kept == [1, 1, 1, 1, 2, 2, 2, 0] * 2 + [1, 1]


def test_a_step_across_a_boundary_has_the_blocks_of_its_first_query() -> None:
    manager, sequence = make_manager(), make_sequence(40)
    compute(manager, sequence, 6)
    manager.allocate(sequence, 12)
    assert 0 not in sequence.local_blocks, "until the step ends"
    manager.advance(sequence, 12)
    assert [block_id != 0 for block_id in sequence.local_blocks] == [False] * 4 + [True]


def test_without_chunks_local_blocks_are_kept() -> None:
    manager, sequence = make_manager(chunk_size=None), make_sequence(40)
    compute(manager, sequence, 30)
    assert 0 not in sequence.local_blocks
    assert not manager.can_ever_fit(81)


@pytest.mark.parametrize(
    ("num_tokens", "num_cached"), [(4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12), (17, 16), (23, 20)]
)
def test_a_hit_is_of_full_blocks_and_leaves_a_token(num_tokens: int, num_cached: int) -> None:
    manager, sequence = make_manager(), make_sequence(23)
    compute(manager, sequence, 23)
    manager.free(sequence)
    hit = manager.find_prefix(make_sequence(num_tokens))
    assert hit.num_tokens == num_cached
    num_passed = num_cached // 8 * 2
    assert [block_id == 0 for block_id in hit.local_blocks[:num_passed]] == [True] * num_passed
    assert 0 not in hit.local_blocks[num_passed:]


@pytest.mark.parametrize("other", [{"salt": "b"}, {"weights_version": 1}, {"first_token": 6}])
def test_other_salt_weights_or_tokens_are_another_prefix(other: dict[str, object]) -> None:
    manager, sequence = make_manager(), make_sequence(23)
    compute(manager, sequence, 23)
    assert manager.find_prefix(make_sequence(23)).num_tokens == 20
    assert manager.find_prefix(make_sequence(23, **other)).num_tokens == 0


def test_a_hit_within_the_first_chunk_without_local_blocks_is_no_hit() -> None:
    manager, sequence = make_manager(num_local=2), make_sequence(7)
    compute(manager, sequence, 7)
    manager.free(sequence)
    stranger = make_sequence(7, salt="other")
    compute(manager, stranger, 7)
    assert manager.global_pool.find(sequence.block_hashes[0]) is not None
    assert manager.find_prefix(make_sequence(7)).num_tokens == 0


def test_blocks_of_a_degraded_sequence_are_not_published() -> None:
    manager, sequence = make_manager(), make_sequence(23)
    compute(manager, sequence, 9)
    sequence.degraded = True
    compute(manager, sequence, 14)
    assert manager.find_prefix(make_sequence(23)).num_tokens == 8


def test_a_shared_block_is_free_when_its_last_holder_is() -> None:
    manager, first, second = make_manager(), make_sequence(23), make_sequence(23)
    compute(manager, first, 23)
    manager.adopt(second, manager.find_prefix(second))
    manager.check_integrity([first, second])
    manager.free(first)
    manager.check_integrity([second])
    assert manager.global_pool.num_free == 15
    manager.free(second)
    manager.check_integrity([])
    assert (manager.global_pool.num_free, manager.local_pool.num_free) == (20, 20)


def test_idle_blocks_of_a_hit_do_not_count_as_free_for_the_rest() -> None:
    manager, first = make_manager(num_global=6), make_sequence(21)
    compute(manager, first, 21)
    manager.free(first)
    fits, too_long = make_sequence(24), make_sequence(25)
    assert manager.can_admit(fits, manager.find_prefix(fits))
    assert not manager.can_admit(too_long, manager.find_prefix(too_long))


def test_idle_local_blocks_of_a_hit_do_not_count_as_free_for_the_rest() -> None:
    manager, first = make_manager(num_local=2), make_sequence(7)
    compute(manager, first, 7)
    manager.free(first)
    other = make_sequence(7, salt="other")
    manager.allocate(other, 1)
    second = make_sequence(7)
    hit = manager.find_prefix(second)
    assert hit.num_tokens == 4
    assert not manager.can_admit(second, hit)


def test_the_tail_of_a_freed_sequence_is_evicted_first() -> None:
    manager, first = make_manager(num_global=5), make_sequence(20)
    compute(manager, first, 20)
    manager.free(first)
    manager.allocate(make_sequence(4, salt="other"), 4)
    assert manager.find_prefix(make_sequence(20)).num_tokens == 16


# The integrity check itself


def leak(manager: BlockManager, sequence: Sequence) -> None:
    manager.global_pool.allocate()


def keep_a_passed_chunk(manager: BlockManager, sequence: Sequence) -> None:
    sequence.local_blocks[0] = manager.local_pool.allocate()


def lose_a_local_block(manager: BlockManager, sequence: Sequence) -> None:
    manager.local_pool.release(sequence.local_blocks[-1])
    sequence.local_blocks[-1] = 0


def use_a_block_twice(manager: BlockManager, sequence: Sequence) -> None:
    sequence.global_blocks[1] = sequence.global_blocks[0]


def change_a_computed_token(manager: BlockManager, sequence: Sequence) -> None:
    sequence.token_ids[2] += 1


def release_twice(manager: BlockManager, sequence: Sequence) -> None:
    manager.global_pool.release(sequence.global_blocks[-1])


def publish_a_block_that_is_not_full(manager: BlockManager, sequence: Sequence) -> None:
    manager.global_pool.publish(sequence.global_blocks[-1], HASHES[0])


@pytest.mark.parametrize(
    "damage",
    [
        leak,
        keep_a_passed_chunk,
        lose_a_local_block,
        use_a_block_twice,
        change_a_computed_token,
        release_twice,
        publish_a_block_that_is_not_full,
    ],
)
def test_the_integrity_check_sees_damage(damage: Callable[[BlockManager, Sequence], None]) -> None:
    manager, sequence = make_manager(), make_sequence(30)
    compute(manager, sequence, 22)
    damage(manager, sequence)
    with pytest.raises(AssertionError):
        manager.check_integrity([sequence])
