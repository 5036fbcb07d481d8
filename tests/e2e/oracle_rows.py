"""Answers against transformers: their log probabilities row by row, their greedy tokens one by one.

T: tokens of prompt and output. V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from answers import Answer
from tiny_models import TinyModel
from transformers import Llama4ForCausalLM

from cluster.client_types import TokenLogprobs
from experts.checkpoint import Checkpoint
from router.config import ModelConfig

# Where transformers' own lead of one token, or of one expert, over the next is smaller, rounding decides.
SMALLEST_MARGIN = 1e-3


def load_tiny(folder: Path) -> TinyModel:
    """A checkpoint as transformers reads it."""
    oracle = Llama4ForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    return TinyModel(
        oracle=oracle, config=ModelConfig.from_checkpoint_config(Checkpoint.open(folder).config), folder=folder
    )


def max_difference(
    tiny: TinyModel, prompt_ids: Sequence[int], answer: Answer, *, resumed_ids: Sequence[int] = ()
) -> float:
    """The largest difference of any log probability, over all positions that the answer has and the whole vocabulary.

    resumed_ids: output before the answer. Both must have been asked for with -1.
    """
    rows_TV = torch.stack([_row(entry, tiny.config.vocab_size) for entry in answer.prompt_logprobs + answer.logprobs])
    token_ids = [*prompt_ids, *resumed_ids, *answer.token_ids]
    expected_TV = torch.log_softmax(tiny.oracle_logits(token_ids[:-1]), dim=-1)[-len(rows_TV) :]
    return (rows_TV - expected_TV).abs().max().item()


def _row(entry: TokenLogprobs, vocab_size: int) -> torch.Tensor:
    """float32 [V]"""
    token_ids, logprobs = zip(*entry.top, strict=True)
    assert sorted(token_ids) == list(range(vocab_size))
    assert dict(entry.top)[entry.token_id] == entry.logprob
    return torch.empty(vocab_size).index_copy_(0, torch.tensor(token_ids), torch.tensor(logprobs))


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyCheck:
    """Of one sequence: positions where transformers, given the tokens before, would have taken another one."""

    num_tokens: int
    num_excused: int
    num_wrong: int


def check_greedy(tiny: TinyModel, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> GreedyCheck:
    """A sequence without a difference is transformers' own: each of its tokens is the one transformers goes on with.
    A difference is excused where transformers is undecided between two tokens, or has been between two experts."""
    with torch.no_grad():
        result = tiny.oracle(torch.tensor([[*prompt_ids, *token_ids[:-1]]]), output_router_logits=True, use_cache=False)
    logits_TV = result.logits[0, len(prompt_ids) - 1 :]
    different = (logits_TV.argmax(-1) != torch.tensor(token_ids)).nonzero().flatten().tolist()
    close_T = _margin(logits_TV, 1) < SMALLEST_MARGIN
    num_experts_per_token = tiny.config.num_experts_per_tok
    gates_TE = [gate.view(-1, tiny.config.num_local_experts) for gate in result.router_logits]
    unsure_T = torch.stack([_margin(gate_TE, num_experts_per_token) < SMALLEST_MARGIN for gate_TE in gates_TE]).any(0)
    excused = [row for row in different if close_T[row] or unsure_T[: len(prompt_ids) + row].any()]
    return GreedyCheck(num_tokens=len(token_ids), num_excused=len(excused), num_wrong=len(different) - len(excused))


def _margin(scores: torch.Tensor, num_chosen: int) -> torch.Tensor:
    """How far the last one chosen is ahead of the first one not."""
    best = scores.topk(num_chosen + 1, dim=-1).values
    return best[..., num_chosen - 1] - best[..., num_chosen]
