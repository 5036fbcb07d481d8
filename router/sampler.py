"""From logits to the next token of each sequence, in vLLM v1's order:

 1. log probabilities, when asked for, of the raw logits
 2. the sequence's token mask (structured output)
 3. min_tokens: end tokens are banned until there are enough; then logit_bias
 4. penalties: repetition over prompt and output, frequency and presence over the output
 5. temperature 0: the most likely token, and done
 6. temperature; then min_p, top_k and top_p, each on what the one before it has left, renormalised
 7. one draw: the first token, in id order, at which the cumulative probability passes the position's uniform number

Each truncation of step 6 keeps the tokens at least as likely as a threshold, so tokens exactly as likely as the
last one kept stay in. Every operation treats a row by itself, so a row's token depends on no other row.

Legend: L logit rows, R rows that are drawn, V vocabulary, N parts of P tokens of it, W weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from router.logprobs import token_logprobs
from router.maxima import Maxima, row_maxima
from router.messages import TokenLogprobs
from router.noise import uniform
from router.sampling_state import SamplingState

_PART_SIZE = 1024
_LARGEST_NOISE = 1.0 - 2.0**-53


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One row's token; logprobs when the sequence asked for them."""

    token_id: int
    logprobs: TokenLogprobs | None


def sample(logits_LV: torch.Tensor, states: Sequence[SamplingState], maxima: Maxima | None = None) -> list[Sampled]:
    """The next token of each sequence from its row of logits_LV, float32, which is left as it was.

    maxima: of logits_LV, if they are known.
    """
    token_ids = _choose(logits_LV, states, maxima)
    logprobs = _logprobs(logits_LV, states, token_ids)
    return [Sampled(token_id=t, logprobs=logprobs.get(row)) for row, t in enumerate(token_ids)]


def _choose(logits_LV: torch.Tensor, states: Sequence[SamplingState], maxima: Maxima | None) -> list[int]:
    """Steps 2 to 7. All greedy and nothing to adjust, the common case, is to take the largest."""
    adjusted = [row for row, state in enumerate(states) if state.changes_logits]
    if adjusted:
        logits_LV, maxima = logits_LV.clone(), None
    for row in adjusted:
        states[row].adjust(logits_LV[row])
    token_ids: list[int] = (maxima or row_maxima(logits_LV)).ids_L.tolist()
    drawn = [row for row, state in enumerate(states) if not state.params.is_greedy]
    if drawn:
        drawn_ids = _draw(logits_LV[drawn], [states[row] for row in drawn])
        for row, token_id in zip(drawn, drawn_ids, strict=True):
            token_ids[row] = token_id
    return token_ids


def _draw(logits_RV: torch.Tensor, states: Sequence[SamplingState]) -> list[int]:
    """Steps 6 and 7."""
    temperatures = [state.params.temperature for state in states]
    temperature_R1 = torch.tensor(temperatures, dtype=torch.float32, device=logits_RV.device).unsqueeze(1)
    probs_RV = torch.softmax(logits_RV / temperature_R1, dim=-1)
    for probs_V, state in zip(probs_RV, states, strict=True):
        _truncate(probs_V, state)
    noise_R = torch.tensor([_noise(state) for state in states], dtype=torch.float64, device=logits_RV.device)
    return _invert(probs_RV, noise_R)


def _invert(probs_RV: torch.Tensor, noise_R: torch.Tensor) -> list[int]:
    """Per row, the first token at which the cumulative probability exceeds noise [0, 1) times the total.

    In two stages, lest a whole vocabulary be summed up in float64: the part of the vocabulary, then the token in it.
    """
    probs_RNP = _parts(probs_RV)
    part_R, rest_R = _pick(probs_RNP.sum(dim=-1), noise_R)
    token_R, _ = _pick(probs_RNP[torch.arange(len(part_R), device=part_R.device), part_R], rest_R)
    token_ids: list[int] = (part_R * _PART_SIZE + token_R).tolist()
    return token_ids


def total_mass(probs_V: torch.Tensor) -> torch.Tensor:
    """The sum, float64, part by part: torch splits that of one long row among threads, and its bits then depend on
    their number."""
    return _parts(probs_V.unsqueeze(0)).sum(dim=-1).sum(dtype=torch.float64)


def _parts(probs_RV: torch.Tensor) -> torch.Tensor:
    """[R, N, P], the last part filled up with zeros."""
    num_rows, vocab_size = probs_RV.shape
    return F.pad(probs_RV, (0, -vocab_size % _PART_SIZE)).view(num_rows, -1, _PART_SIZE)


def _pick(weights_RW: torch.Tensor, noise_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The index that each row's noise falls on, and where in that index's share it falls, again in [0, 1).

    The draw lies strictly below the total, so the first cumulative weight above it exists and its weight is not 0.
    """
    cumulative_RW = weights_RW.to(torch.float64).cumsum(dim=-1)
    draw_R1 = (noise_R * cumulative_RW[:, -1]).unsqueeze(1)
    index_R1 = torch.searchsorted(cumulative_RW, draw_R1, right=True)
    end_R1 = cumulative_RW.gather(1, index_R1)
    share_R1 = weights_RW.gather(1, index_R1).to(torch.float64)
    rest_R1 = 1.0 - (end_R1 - draw_R1) / share_R1
    return index_R1.squeeze(1), rest_R1.squeeze(1).clamp(0.0, _LARGEST_NOISE)


def _noise(state: SamplingState) -> float:
    params = state.params
    return uniform(seed=params.seed, choice_index=params.choice_index, position=state.num_output_tokens)


def _truncate(probs_V: torch.Tensor, state: SamplingState) -> None:
    """min_p, top_k, top_p in place: what is cut has probability 0, the rest is not rescaled."""
    params = state.params
    if params.min_p > 0.0:
        _keep_from(probs_V, params.min_p * probs_V.max())
    if 0 < params.top_k < probs_V.shape[0]:
        _keep_from(probs_V, probs_V.topk(params.top_k).values[-1])
    if params.top_p < 1.0:
        _keep_from(probs_V, _nucleus_threshold(probs_V, params.top_p))


def _keep_from(probs_V: torch.Tensor, threshold: torch.Tensor) -> None:
    probs_V.masked_fill_(probs_V < threshold, 0.0)


def _nucleus_threshold(probs_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """The probability of the last token of the smallest most likely set with at least top_p of the mass."""
    total = total_mass(probs_V)
    # Tokens below the average of what may be cut are cut all together, so they need no sorting. Half of it, so that
    # rounding cannot matter.
    candidates = probs_V[probs_V >= 0.5 * (1.0 - top_p) * total / len(probs_V)]
    most_likely = candidates.sort(descending=True).values
    mass_before = most_likely.to(torch.float64).cumsum(dim=0) - most_likely
    num_kept = int((mass_before < top_p * total).sum())
    return most_likely[num_kept - 1]


def _logprobs(
    logits_LV: torch.Tensor, states: Sequence[SamplingState], token_ids: Sequence[int]
) -> dict[int, TokenLogprobs]:
    """Step 1, by row. Rows that want equally many alternatives go together, so ties never depend on other rows."""
    rows_by_num_top: defaultdict[int, list[int]] = defaultdict(list)
    for row, state in enumerate(states):
        if state.params.num_logprobs is not None:
            rows_by_num_top[state.params.num_logprobs].append(row)
    found: dict[int, TokenLogprobs] = {}
    for num_top, rows in rows_by_num_top.items():
        entries = token_logprobs(logits_LV[rows], [token_ids[row] for row in rows], num_top)
        found.update(zip(rows, entries, strict=True))
    return found
