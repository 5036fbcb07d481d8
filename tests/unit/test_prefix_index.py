"""What a gateway believes of routers' prefix caches."""

from __future__ import annotations

from cluster.front.prefix_index import KEY_BYTES, MAX_KEYS, PrefixIndex, prefix_keys, split_keys
from router.prefix_cache.block_hash import next_hash, root_hash

BLOCK = 4


def keys_of(*token_ids: int, salt: str = "", version: int = 0) -> list[bytes]:
    return split_keys(prefix_keys(token_ids, block_size=BLOCK, weights_version=version, cache_salt=salt))


def test_keys_are_the_beginnings_of_the_engines_own_hashes_of_full_blocks() -> None:
    first = next_hash(root_hash(weights_version=0, cache_salt="mine"), [1, 2, 3, 4])
    second = next_hash(first, [5, 6, 7, 8])
    assert keys_of(*range(1, 11), salt="mine") == [first[:KEY_BYTES], second[:KEY_BYTES]]


def test_the_last_token_is_always_computed_so_its_block_is_no_hit() -> None:
    assert len(keys_of(*range(8))) == 1
    assert len(keys_of(*range(9))) == 2
    assert keys_of() == keys_of(1) == []


def test_an_endless_prompt_has_an_end_of_keys() -> None:
    assert len(keys_of(*range(BLOCK * (MAX_KEYS + 10)))) == MAX_KEYS


def test_a_prefix_counts_as_far_as_it_is_the_same_of_the_same_weights_and_salt_at_the_same_router() -> None:
    index = PrefixIndex(100)
    index.note("a", keys_of(*range(17), salt="mine"))
    assert index.num_cached("a", keys_of(*range(17), salt="mine")) == 4
    assert index.num_cached("a", keys_of(*range(8), 99, *range(9, 17), salt="mine")) == 2
    assert index.num_cached("a", keys_of(*range(17), salt="another")) == 0
    assert index.num_cached("a", keys_of(*range(17), salt="mine", version=1)) == 0
    assert index.num_cached("b", keys_of(*range(17), salt="mine")) == 0


def test_the_end_of_the_prompt_that_was_not_asked_for_longest_is_forgotten_first() -> None:
    index = PrefixIndex(5)
    old, new = keys_of(*range(13)), keys_of(*range(100, 113))
    index.note("a", old)
    index.note("a", new)
    assert (index.num_cached("a", old), index.num_cached("a", new)) == (2, 3)
    index.note("a", old)
    assert (index.num_cached("a", old), index.num_cached("a", new)) == (3, 2)


def test_a_router_that_has_gone_takes_its_blocks_with_it() -> None:
    index = PrefixIndex(100)
    for router in ("a", "b"):
        index.note(router, keys_of(*range(9)))
    index.keep(["b"])
    assert [index.num_cached(router, keys_of(*range(9))) for router in ("a", "b")] == [0, 2]
