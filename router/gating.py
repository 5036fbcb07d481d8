"""The MoE gate: which experts each token goes to, and by how much its copies are scaled.

Top-k of the raw logits; the score is the sigmoid of the logit, with no softmax and no renormalisation
(llama4.md §2, step 8).

Shapes: T tokens, D model, E experts, K top-k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from experts.linear import PackedLinear


class Gating(NamedTuple):
    topk_ids_TK: torch.Tensor
    topk_scores_TK: torch.Tensor


class Gate:
    """``gate_ED`` is the checkpoint's router weight."""

    def __init__(self, gate_ED: PackedLinear, top_k: int) -> None:
        self._gate_ED = gate_ED
        self._top_k = top_k

    def __call__(self, x_TD: torch.Tensor) -> Gating:
        """Expert ids, int64 and distinct per token, highest logit first; float32 scores in (0, 1)."""
        logits_TE = self._gate_ED.wide(x_TD)
        topk_logits_TK, topk_ids_TK = logits_TE.topk(self._top_k, dim=-1)
        return Gating(topk_ids_TK, scores(topk_logits_TK))


def scores(logits_TK: torch.Tensor) -> torch.Tensor:
    """Sigmoid in float32. Not torch.sigmoid, whose vector body and scalar tail round differently on a CPU."""
    return 1.0 / (1.0 + torch.exp(-logits_TK))
