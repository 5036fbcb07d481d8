"""Tokens for dispatchers. Shapes: T tokens, D model, E experts, K top-k."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from expert_fleet import HIDDEN, LAYERS

from experts.dispatch import Dispatcher

NUM_EXPERTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    x_TD: torch.Tensor
    ids_TK: torch.Tensor
    scores_TK: torch.Tensor


def random_rows(
    num_tokens: int,
    *,
    top_k: int = 1,
    num_experts: int = NUM_EXPERTS,
    seed: int = 0,
    skewed: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Rows:
    """skewed: most tokens go to expert 0, the others to the first half of the experts."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator)
    if skewed:
        logits_TE[:, num_experts // 2 :] -= 100
        logits_TE[:, 0] += 2
    scores_TK, ids_TK = logits_TE.topk(top_k, dim=1)
    x_TD = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
    return Rows(x_TD=x_TD, ids_TK=ids_TK, scores_TK=torch.sigmoid(scores_TK))


def run(dispatcher: Dispatcher, rows: Rows, layer: int = LAYERS[0]) -> torch.Tensor:
    combined = dispatcher.combine(dispatcher.dispatch(layer, rows.x_TD, rows.ids_TK, rows.scores_TK))
    assert combined.missing_T is None
    return combined.y_TD
