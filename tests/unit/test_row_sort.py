"""Compiled sorting and summing of rows against the plain form, bit for bit. Shapes: T tokens, D model, K top-k."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.native.lane_kernels import lane_kernels
from experts.row_plan import ExpertOrder
from experts.row_sort import RowSorter

kernels = lane_kernels()
pytestmark = pytest.mark.skipif(kernels is None, reason="no compiled kernels here")


def random_order(num_experts: int, seed: int) -> ExpertOrder:
    experts = np.random.default_rng(seed).permutation(num_experts)
    rank_E = np.empty(num_experts, dtype=np.int64)
    rank_E[experts] = np.arange(num_experts)
    return ExpertOrder(rank_E, experts.tolist())


@given(
    num_tokens=st.integers(0, 30),
    top_k=st.integers(1, 5),
    width=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_compiled_rows_have_the_bits_of_the_plain_ones(
    num_tokens: int, top_k: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = random_order(9, seed)
    ids_TK = torch.rand(num_tokens, 9, generator=generator).topk(top_k, dim=1).indices
    scores_TK = torch.rand(num_tokens, top_k, generator=generator)
    x_TD = (torch.randn(num_tokens, width, generator=generator) * 10 ** (seed % 40 - 20)).to(dtype)
    plain, compiled = RowSorter(None), RowSorter(kernels)
    plan, rows_RB = plain.sort(x_TD, ids_TK, scores_TK, order)
    own_plan, own_rows_RB = compiled.sort(x_TD, ids_TK, scores_TK, order)
    assert (own_plan.spans, own_plan.ranks) == (plan.spans, plan.ranks)
    np.testing.assert_array_equal(own_plan.copy_of_row_R, plan.copy_of_row_R)
    np.testing.assert_array_equal(own_plan.row_of_copy_TK, plan.row_of_copy_TK)
    np.testing.assert_array_equal(own_rows_RB, rows_RB)
    if num_tokens:
        bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
        put_back = compiled.put_back(rows_RB, plan, x_TD)
        assert torch.equal(put_back.view(bits), plain.put_back(rows_RB, plan, x_TD).view(bits))


def test_tokens_that_do_not_lie_one_behind_the_other_are_sorted_as_well() -> None:
    x_TD = torch.randn(16, 6).T
    ids_TK, scores_TK = torch.arange(12).reshape(2, 6).T % 4, torch.rand(2, 6).T
    order = random_order(4, 1)
    plan, rows_RB = RowSorter(None).sort(x_TD, ids_TK, scores_TK, order)
    own_plan, own_rows_RB = RowSorter(kernels).sort(x_TD, ids_TK, scores_TK, order)
    np.testing.assert_array_equal(own_rows_RB, rows_RB)
    assert own_plan.spans == plan.spans


@pytest.mark.parametrize("expert", [-1, 4, 2**40])
def test_an_expert_that_the_order_does_not_have_is_an_index_error(expert: int) -> None:
    ids_TK = torch.tensor([[0], [expert]])
    with pytest.raises(IndexError):
        RowSorter(kernels).sort(torch.zeros(2, 4), ids_TK, torch.ones(2, 1), random_order(4, 1))


@pytest.mark.parametrize("choice", [None, kernels])
def test_shapes_that_do_not_belong_together_are_the_callers_mistake(choice: object) -> None:
    with pytest.raises(ValueError, match=r"must both be \[3, K\]"):
        RowSorter(choice).sort(torch.zeros(3, 4), torch.zeros(2, 1).long(), torch.ones(2, 1), random_order(4, 1))  # type: ignore[arg-type]
