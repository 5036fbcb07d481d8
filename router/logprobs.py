"""Log probabilities for the client: of the raw logits, before penalties, masks and temperature.

Legend: R rows, V vocabulary, K the most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from router.messages import TokenLogprobs
from router.sampling_params import WHOLE_VOCABULARY


def token_logprobs(logits_RV: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """One entry per row: the given token's log probability and the num_top most likely (-1: all of them).

    logits_RV is float32. A row's result depends on that row alone.
    """
    logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
    chosen_R1 = torch.tensor(token_ids, dtype=torch.int64, device=logits_RV.device).unsqueeze(1)
    chosen = logprobs_RV.gather(1, chosen_R1).squeeze(1).tolist()
    tops = _most_likely(logprobs_RV, num_top)
    return [
        TokenLogprobs(token_id=token_id, logprob=logprob, top=top)
        for token_id, logprob, top in zip(token_ids, chosen, tops, strict=True)
    ]


def _most_likely(logprobs_RV: torch.Tensor, num_top: int) -> list[list[tuple[int, float]]]:
    vocab_size = logprobs_RV.shape[1]
    if num_top == 0:
        return [[] for _ in range(logprobs_RV.shape[0])]
    if num_top == WHOLE_VOCABULARY or num_top >= vocab_size:
        values_RK, ids_RK = logprobs_RV.sort(dim=-1, descending=True, stable=True)
    else:
        values_RK, ids_RK = logprobs_RV.topk(num_top, dim=-1)
    return [
        list(zip(ids, values, strict=True)) for ids, values in zip(ids_RK.tolist(), values_RK.tolist(), strict=True)
    ]
