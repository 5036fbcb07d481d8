"""The oracle itself, against a literal transcription of Llama 4's MoE.

Shapes: T tokens, D model, E experts, K top-k, H expert width.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.dispatch import LocalDispatcher
from experts.epoch import Epoch, ShardAddress
from experts.linear import pack_linear
from experts.message import Refusal
from experts.mlp import Mlp
from experts.placement import ExpertPlacement, ShardId, Slot
from experts.routed_rows import combine_rows, route_rows
from experts.shard import Shard

E, D, H = 6, 24, 40
LAYER = 3


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up [E, D, 2H] and down [E, H, D], as a checkpoint has them."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(E, D, 2 * H, generator=generator) / 5, torch.randn(E, H, D, generator=generator) / 6


def make_shard(experts: range = range(E), weights_version: int = 0) -> Shard:
    gate_up, down = weights()
    slots = {
        Slot(LAYER, expert): Mlp(
            gate=pack_linear(gate_up[expert, :, :H].T),
            up=pack_linear(gate_up[expert, :, H:].T),
            down=pack_linear(down[expert].T),
        )
        for expert in experts
    }
    return Shard(
        shard_id=ShardId("a"), slots=slots, hidden_size=D, dtype=torch.float32, weights_version=weights_version
    )


def reference_moe(x_TD: torch.Tensor, logits_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """Llama4TextMoe's routed part, line by line: every expert sees every token, scaled by its score or zero."""
    gate_up, down = weights()
    top_logits, top_ids = torch.topk(logits_TE, top_k, dim=1)
    scores_TE = torch.full_like(logits_TE, float("-inf")).scatter_(1, top_ids, top_logits)
    scores_TE = torch.sigmoid(scores_TE.float()).to(x_TD.dtype)
    routed_ETD = x_TD.unsqueeze(0) * scores_TE.T.unsqueeze(2)
    gate_ETH, up_ETH = torch.bmm(routed_ETD, gate_up).chunk(2, dim=-1)
    return torch.bmm(up_ETH * F.silu(gate_ETH), down).sum(dim=0)


def gated(logits_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    top_logits, top_ids = torch.topk(logits_TE, top_k, dim=1)
    return top_ids, torch.sigmoid(top_logits)


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_the_local_dispatcher_is_llama_4s_moe(top_k: int) -> None:
    x_TD, logits_TE = torch.randn(30, D), torch.randn(30, E)
    dispatcher = LocalDispatcher(make_shard())
    combined = dispatcher.combine(dispatcher.dispatch(LAYER, x_TD, *gated(logits_TE, top_k)))
    assert combined.missing_T is None
    torch.testing.assert_close(combined.y_TD, reference_moe(x_TD, logits_TE, top_k), rtol=1e-5, atol=1e-5)


def test_a_score_near_a_tenth_scales_the_input_not_the_output() -> None:
    x_TD, logits_TE = 3 * torch.randn(8, D), torch.full((8, E), -9.0)
    logits_TE[:, 2] = -2.2
    ids_TK, scores_TK = gated(logits_TE, 1)
    torch.testing.assert_close(scores_TK, torch.full((8, 1), 0.1), rtol=0.01, atol=0)
    dispatcher = LocalDispatcher(make_shard())
    got_TD = dispatcher.combine(dispatcher.dispatch(LAYER, x_TD, ids_TK, scores_TK)).y_TD
    torch.testing.assert_close(got_TD, reference_moe(x_TD, logits_TE, 1), rtol=1e-5, atol=1e-5)
    scaled_late_TD = dispatcher.combine(dispatcher.dispatch(LAYER, x_TD, ids_TK, torch.ones(8, 1))).y_TD * scores_TK
    assert (scaled_late_TD - got_TD).norm() > 2 * got_TD.norm()


@given(st.integers(0, 40), st.integers(1, 4), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_combine_undoes_what_dispatch_permuted(num_tokens: int, top_k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, 3, generator=generator)
    ids_TK = torch.rand(num_tokens, 8, generator=generator).topk(top_k, dim=1).indices
    routed = route_rows(x_TD, ids_TK, torch.ones(num_tokens, top_k))
    experts = [span.expert for span in routed.spans]
    assert experts == sorted(set(ids_TK.flatten().tolist()))
    assert [span.start for span in routed.spans] + [num_tokens * top_k] == [0] + [span.stop for span in routed.spans]
    for span in routed.spans:
        tokens = (ids_TK == span.expert).any(1).nonzero().flatten()
        assert torch.equal(routed.x_RD[span.start : span.stop], x_TD[tokens])
    total_TD = combine_rows(routed.x_RD, routed.row_of_copy_TK)
    torch.testing.assert_close(total_TD, x_TD * top_k)


def test_one_expert_per_token_comes_back_with_its_own_bits() -> None:
    x_TD = torch.tensor([[-0.0, float("inf")], [1e-45, -1.0]])
    routed = route_rows(x_TD, torch.tensor([[1], [0]]), torch.ones(2, 1))
    back_TD = combine_rows(routed.x_RD, routed.row_of_copy_TK)
    assert torch.equal(back_TD.view(torch.int32), x_TD.view(torch.int32))


def test_gate_outputs_of_the_wrong_shape_are_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match=r"topk_ids \[3, 1\] and topk_scores \[2, 1\] must both be \[2, K\]"):
        route_rows(torch.zeros(2, 4), torch.zeros(3, 1, dtype=torch.long), torch.zeros(2, 1))


def test_a_slot_that_is_not_loaded_is_named() -> None:
    with pytest.raises(ValueError, match=r"Slot\(layer=3, expert=5\) of weights version 0 is not loaded on a"):
        make_shard(range(3)).apply(LAYER, torch.zeros(1, D), [(5, 1)])


def test_counts_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="adds up to 3, x_RD has 2 rows"):
        make_shard().apply(LAYER, torch.zeros(2, D), [(0, 3)])


def test_load_counts_rows_per_slot() -> None:
    shard = make_shard(range(3))
    shard.apply(LAYER, torch.zeros(5, D), [(0, 4), (2, 1)])
    shard.apply(LAYER, torch.zeros(1, D), [(2, 1)])
    assert shard.load.snapshot() == [(LAYER, 0, 4), (LAYER, 1, 0), (LAYER, 2, 2)]


def epoch(number: int, *, weights_version: int = 0, experts: range = range(E)) -> Epoch:
    address = ShardAddress(shard_id=ShardId("a"), node_id="n", host="h", port=1)
    slots = tuple(Slot(LAYER, expert) for expert in experts)
    placement = ExpertPlacement(slots_by_shard={ShardId("a"): slots})
    return Epoch(number=number, weights_version=weights_version, shards=(address,), placement=placement)


def refusal(shard: Shard, number: int, expert: int = 0, weights_version: int = 0) -> Refusal | None:
    return shard.refusal(epoch=number, weights_version=weights_version, slots=[Slot(LAYER, expert)])


def test_a_shard_serves_two_epochs_and_refuses_all_others() -> None:
    shard = make_shard()
    assert refusal(shard, 1) is Refusal.STALE_EPOCH
    for number in (2, 5, 5):
        shard.serve_epoch(epoch(number))
    with pytest.raises(ValueError, match=r"epoch 6 would be one too many beside \[2, 5\]"):
        shard.serve_epoch(epoch(6))
    assert shard.epochs == (2, 5)
    assert [number for number in range(1, 8) if refusal(shard, number) is None] == [2, 5]
    assert refusal(shard, 6) is Refusal.STALE_EPOCH
    shard.retire_epoch(2)
    assert refusal(shard, 2) is Refusal.STALE_EPOCH
    assert refusal(shard, 5, weights_version=1) is Refusal.OTHER_WEIGHTS_VERSION


def test_a_shard_refuses_a_slot_that_it_has_but_the_epoch_does_not_give_it() -> None:
    shard = make_shard()
    shard.serve_epoch(epoch(1, experts=range(2)))
    assert refusal(shard, 1, expert=1) is None
    assert refusal(shard, 1, expert=2) is Refusal.NO_SUCH_SLOT


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (epoch(3), "epoch 3 is older than the served epoch 4"),
        (epoch(9, weights_version=1), "places slots of weights version 1 that a lacks"),
        (epoch(9, experts=range(E + 1)), "places slots of weights version 0 that a lacks"),
    ],
)
def test_an_epoch_that_a_shard_cannot_serve_is_refused(wrong: Epoch, message: str) -> None:
    shard = make_shard()
    shard.serve_epoch(epoch(4))
    with pytest.raises(ValueError, match=message):
        shard.serve_epoch(wrong)
    assert shard.epochs == (4,)
