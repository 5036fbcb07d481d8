"""How many KV blocks fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.capacity import KvDemand, fitting_capacity, fixed_capacity

DEMAND = KvDemand(
    max_model_len=1000,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    block_size=16,
    attention_chunk_size=128,
    global_block_bytes=100,
    local_block_bytes=300,
)


def test_memory_for_everything_gives_every_sequence_its_full_length() -> None:
    capacity = fitting_capacity(DEMAND, memory_bytes=10**9)
    assert capacity.num_global_blocks == 1 + 4 * 63
    assert capacity.num_local_blocks == 1 + 4 * 12, "a chunk of 8 blocks and a step of 4, for each sequence"
    assert capacity.num_bytes == 253 * 100 + 49 * 300


def test_what_fits_is_within_memory_and_one_block_more_is_not() -> None:
    for memory_bytes in range(26_000, 40_000, 777):
        capacity = fitting_capacity(DEMAND, memory_bytes=memory_bytes)
        assert capacity.num_bytes <= memory_bytes
        larger = fixed_capacity(DEMAND, num_kv_blocks=capacity.num_global_blocks, memory_bytes=10**9)
        assert larger.num_bytes > memory_bytes


def test_too_little_memory_names_the_length_that_fits() -> None:
    with pytest.raises(ValueError, match=r"max_model_len 1000 does not fit.*sequences of 192 tokens") as refused:
        fitting_capacity(DEMAND, memory_bytes=13 * 400 + 99)
    assert "lower max_model_len" in str(refused.value)
    assert fitting_capacity(replace(DEMAND, max_model_len=192), memory_bytes=5299).num_global_blocks == 13


def test_without_chunks_local_layers_keep_what_global_layers_keep() -> None:
    capacity = fitting_capacity(replace(DEMAND, attention_chunk_size=None), memory_bytes=10**9)
    assert capacity.num_local_blocks == capacity.num_global_blocks


def test_blocks_asked_for_are_usable_blocks_besides_the_null_block() -> None:
    capacity = fixed_capacity(DEMAND, num_kv_blocks=70, memory_bytes=10**9)
    assert (capacity.num_global_blocks, capacity.num_local_blocks) == (71, 49)


def test_blocks_that_hold_no_full_sequence_are_refused_with_the_number_that_would() -> None:
    with pytest.raises(ValueError, match=r"num_kv_blocks 62 .* raise num_kv_blocks to 63"):
        fixed_capacity(DEMAND, num_kv_blocks=62, memory_bytes=10**9)
    with pytest.raises(ValueError, match="num_kv_blocks must be at least 1, not 0"):
        fixed_capacity(DEMAND, num_kv_blocks=0, memory_bytes=10**9)


def test_blocks_asked_for_beyond_memory_are_refused_with_the_number_that_fits() -> None:
    fitting = fitting_capacity(DEMAND, memory_bytes=30_000).num_global_blocks - 1
    with pytest.raises(ValueError, match=f"{fitting} blocks fit"):
        fixed_capacity(DEMAND, num_kv_blocks=1000, memory_bytes=30_000)


def test_a_model_without_global_layers_has_a_capacity() -> None:
    capacity = fitting_capacity(replace(DEMAND, global_block_bytes=0), memory_bytes=20_000)
    assert capacity.num_bytes <= 20_000


def test_a_size_below_one_is_named() -> None:
    with pytest.raises(ValueError, match="max_num_seqs must be at least 1, not 0"):
        replace(DEMAND, max_num_seqs=0)


def test_the_sentence_for_the_log_says_what_fits() -> None:
    sentence = fitting_capacity(DEMAND, memory_bytes=10**9).describe(DEMAND)
    assert "253 global and 49 local blocks of 16 tokens hold 4032 tokens" in sentence
    assert "4.0 sequences of max_model_len 1000" in sentence
