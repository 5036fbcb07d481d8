"""What is sampled, how often, and that no other row has a say in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from router.noise import uniform
from router.sampler import Sampled, sample, total_mass
from router.sampling_params import SamplingParams
from router.sampling_state import SamplingState

CPU = torch.device("cpu")
NUM_DRAWS = 20_000


def state_of(
    vocab_size: int,
    *,
    prompt_ids: Sequence[int] = (),
    output_ids: Sequence[int] = (),
    eos_token_ids: Sequence[int] = (),
    **fields: Any,
) -> SamplingState:
    return SamplingState(
        SamplingParams(**({"max_tokens": 10**6} | fields)),
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        eos_token_ids=eos_token_ids,
        vocab_size=vocab_size,
        device=CPU,
    )


def sample_one(logits_V: torch.Tensor, state: SamplingState) -> Sampled:
    (sampled,) = sample(logits_V.unsqueeze(0), [state])
    return sampled


def draws(logits_V: torch.Tensor, *, num_draws: int = NUM_DRAWS, **fields: Any) -> torch.Tensor:
    """What comes at successive positions of one sequence whose logits are always these."""
    states = [state_of(len(logits_V), **fields) for _ in range(num_draws)]
    for position, state in enumerate(states):
        state.num_output_tokens = position
    sampled = sample(logits_V.expand(num_draws, -1).contiguous(), states)
    return torch.tensor([one.token_id for one in sampled])


def draw_counts(logits_V: torch.Tensor, **fields: Any) -> torch.Tensor:
    return torch.bincount(draws(logits_V, **fields), minlength=len(logits_V))


def chi_square_p_value(counts_V: torch.Tensor, probs_V: torch.Tensor) -> float:
    """Of the hypothesis that the counts are draws from probs_V; a draw of an impossible token gives 0."""
    possible = probs_V > 0
    if counts_V[~possible].any():
        return 0.0
    expected = probs_V[possible].double() * counts_V.sum()
    statistic = ((counts_V[possible] - expected) ** 2 / expected).sum()
    if len(expected) == 1:
        return 1.0
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


LOGITS = torch.tensor([2.0, 1.5, 1.5, 0.0, -1.0, 0.7, -0.3, 1.1])


def truncated(probs_V: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    mask_V = torch.zeros_like(probs_V)
    mask_V[list(kept)] = 1
    return probs_V * mask_V / (probs_V * mask_V).sum()


@pytest.mark.parametrize(
    ("fields", "temperature", "kept"),
    [
        ({}, 1.0, range(8)),
        ({"temperature": 0.5}, 0.5, range(8)),
        ({"temperature": 3.0}, 3.0, range(8)),
        ({"top_k": 4}, 1.0, [0, 1, 2, 7]),
        ({"top_k": 100}, 1.0, range(8)),
        ({"top_p": 0.5}, 1.0, [0, 1, 2]),
        ({"top_p": 0.01}, 1.0, [0]),
        ({"min_p": 0.4}, 1.0, [0, 1, 2, 7]),
        ({"top_k": 5, "top_p": 0.8}, 1.0, [0, 1, 2, 7]),
    ],
)
def test_draws_follow_the_exact_distribution(fields: dict[str, Any], temperature: float, kept: Sequence[int]) -> None:
    probs_V = truncated(torch.softmax(LOGITS.double() / temperature, dim=-1), kept)
    assert chi_square_p_value(draw_counts(LOGITS, seed=3, **fields), probs_V) > 0.001


def test_the_chi_square_test_tells_other_distributions_apart() -> None:
    counts_V = draw_counts(LOGITS, temperature=0.9)
    assert chi_square_p_value(counts_V, torch.softmax(LOGITS.double(), dim=-1)) < 1e-6


def test_choices_and_seeds_draw_independently() -> None:
    """The pair of two choices' draws must have the product distribution."""
    logits_V = torch.tensor([0.5, 0.0, -0.5])
    first = draws(logits_V, seed=1, choice_index=0)
    for fields in ({"seed": 1, "choice_index": 1}, {"seed": 2, "choice_index": 0}):
        pairs = torch.bincount(first * 3 + draws(logits_V, **fields), minlength=9)
        probs_V = torch.softmax(logits_V.double(), dim=-1)
        assert chi_square_p_value(pairs, torch.outer(probs_V, probs_V).flatten()) > 0.001


def test_the_noise_is_a_fixed_function() -> None:
    """These numbers may never change: a stream must go on alike on a router of another release."""
    assert uniform(seed=0, choice_index=0, position=0) == 0.156742553465558
    assert uniform(seed=2**63 - 1, choice_index=7, position=100_000) == 0.4282309111818722


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "num_logprobs": 3},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.3, "seed": 2, "top_p": 0.9, "num_logprobs": 0},
    {"temperature": 1.0, "seed": 3, "top_k": 7, "num_logprobs": 3},
    {"temperature": 1.0, "seed": 4, "min_p": 0.05, "num_logprobs": -1},
    {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": -0.3},
    {"temperature": 0.0, "logit_bias": {3: 4.0, 5: -100.0}, "num_logprobs": 2},
    {"temperature": 1.0, "seed": 6, "top_p": 0.999, "top_k": 2000, "min_p": 0.0001, "min_tokens": 9},
]


@pytest.mark.parametrize("vocab_size", [37, 5003])
def test_a_row_depends_on_no_other_row(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits_LV = torch.randn(len(MIXED), vocab_size, generator=generator) * 4
    context = {"prompt_ids": [1, 2, 3], "output_ids": [3, 4, 4], "eos_token_ids": [6]}
    states = [state_of(vocab_size, **context, **fields) for fields in MIXED]
    together = sample(logits_LV, states)
    alone = [sample_one(logits_V.clone(), state) for logits_V, state in zip(logits_LV, states, strict=True)]
    assert together == alone
    order = torch.randperm(len(MIXED), generator=generator).tolist()
    assert sample(logits_LV[order], [states[i] for i in order]) == [together[i] for i in order]
    assert sample(logits_LV[2:6], states[2:6]) == together[2:6]


def test_the_mass_of_a_nucleus_does_not_depend_on_the_number_of_threads() -> None:
    rows_LV = torch.softmax(torch.randn(12, 131_077, generator=torch.Generator().manual_seed(1)) * 3, dim=-1)
    num_threads = torch.get_num_threads()
    totals = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        totals.append([total_mass(probs_V).item() for probs_V in rows_LV])
    torch.set_num_threads(num_threads)
    assert totals[0] == totals[1]


def test_the_given_logits_are_left_as_they_were() -> None:
    logits_LV = torch.randn(len(MIXED), 50, generator=torch.Generator().manual_seed(1))
    before = logits_LV.clone()
    sample(logits_LV, [state_of(50, prompt_ids=[1], output_ids=[2], eos_token_ids=[3], **f) for f in MIXED])
    assert torch.equal(logits_LV, before)


def test_greedy_takes_the_most_likely_token() -> None:
    logits_LV = torch.randn(20, 300, generator=torch.Generator().manual_seed(2))
    sampled = sample(logits_LV, [state_of(300, temperature=0.0) for _ in range(20)])
    assert [one.token_id for one in sampled] == logits_LV.argmax(dim=-1).tolist()


def test_a_wide_nucleus_is_found() -> None:
    logits_V = torch.linspace(0.1, 0.0, 5000)
    probs_V = torch.softmax(logits_V.double(), dim=-1)
    num_kept = int((probs_V.cumsum(0) - probs_V < 0.5).sum())
    drawn = draws(logits_V, num_draws=2000, top_p=0.5)
    assert num_kept - 20 < int(drawn.max()) < num_kept


@pytest.mark.parametrize(("first", "last"), [(1, 2), (1024, 2047), (1, 4998), (1500, 3001)])
def test_at_the_ends_of_the_noise_only_tokens_with_mass_are_drawn(
    monkeypatch: pytest.MonkeyPatch, first: int, last: int
) -> None:
    logits_V = torch.full((5000,), -50.0)
    logits_V[[first, last]] = 3.0
    for noise, token_id in ((0.0, first), (0.499, first), (0.501, last), (1 - 2**-53, last)):
        monkeypatch.setattr("router.sampler.uniform", lambda noise=noise, **_: noise)
        assert sample_one(logits_V, state_of(5000, top_k=2)).token_id == token_id


def test_draws_follow_the_exact_distribution_over_many_parts_of_the_vocabulary() -> None:
    logits_V = torch.full((5000,), -30.0)
    likely = [0, 700, 1023, 1024, 2500, 4095, 4999]
    logits_V[likely] = torch.tensor([0.0, 1.0, -1.0, 0.5, 0.2, -0.4, 1.3])
    counts_V = torch.bincount(draws(logits_V, num_draws=5000), minlength=5000)
    assert chi_square_p_value(counts_V[likely], torch.softmax(logits_V.double(), dim=-1)[likely]) > 0.001
    assert counts_V[likely].sum() == 5000


def test_a_tiny_temperature_is_greedy_and_the_largest_is_nearly_uniform() -> None:
    assert draw_counts(LOGITS, temperature=1e-6)[0] == NUM_DRAWS
    assert chi_square_p_value(draw_counts(torch.zeros(4), temperature=100.0), torch.full((4,), 0.25)) > 0.001


# What changes logits


def adjusted(logits_V: torch.Tensor, **fields: Any) -> list[float]:
    changed_V = logits_V.clone()
    state_of(len(logits_V), **fields).adjust(changed_V)
    return changed_V.tolist()


def test_repetition_penalty_counts_prompt_and_output() -> None:
    logits_V = torch.tensor([2.0, -2.0, 2.0, -2.0])
    assert adjusted(logits_V, prompt_ids=[0], output_ids=[1], repetition_penalty=2.0) == [1.0, -4.0, 2.0, -2.0]


def test_frequency_and_presence_penalties_count_the_output_only() -> None:
    logits_V = torch.zeros(3)
    context = {"prompt_ids": [0, 0], "output_ids": [1, 1, 2]}
    assert adjusted(logits_V, frequency_penalty=0.5, **context) == [0.0, -1.0, -0.5]
    assert adjusted(logits_V, presence_penalty=0.5, **context) == [0.0, -0.5, -0.5]


def test_penalties_see_each_new_token() -> None:
    state = state_of(3, frequency_penalty=1.0)
    for _ in range(2):
        state.append(1)
    logits_V = torch.zeros(3)
    state.adjust(logits_V)
    assert logits_V.tolist() == [0.0, -2.0, 0.0]


def test_bias_comes_before_penalties() -> None:
    logits_V = torch.tensor([-1.0, 0.0])
    assert adjusted(logits_V, prompt_ids=[0], logit_bias={0: 3.0}, repetition_penalty=2.0) == [1.0, 0.0]


def test_end_tokens_are_banned_below_min_tokens_even_against_a_bias() -> None:
    fields = {"min_tokens": 2, "stop_token_ids": (1,), "eos_token_ids": [2], "logit_bias": {1: 100.0, 2: 100.0}}
    logits_V = torch.zeros(4)
    assert adjusted(logits_V, **fields, output_ids=[0]) == [0.0, -math.inf, -math.inf, 0.0]
    assert adjusted(logits_V, **fields, output_ids=[0, 0]) == [0.0, 100.0, 100.0, 0.0]
    assert adjusted(logits_V, **fields, ignore_eos=True) == [0.0, -math.inf, 100.0, 0.0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_leaves_only_what_it_allows(temperature: float) -> None:
    state = state_of(8, temperature=temperature, repetition_penalty=2.0, prompt_ids=[4], logit_bias={0: 50.0})
    state.allowed_V = torch.tensor([False, False, False, False, True, False, True, False])
    tokens = set()
    for position in range(50):
        state.num_output_tokens = position
        tokens.add(sample_one(LOGITS, state).token_id)
    assert tokens == ({6} if temperature == 0.0 else {4, 6})


# Log probabilities


def test_logprobs_are_of_the_raw_logits() -> None:
    fields = {"temperature": 0.3, "logit_bias": {4: 100.0}, "repetition_penalty": 2.0, "prompt_ids": [4, 0]}
    sampled = sample_one(LOGITS, state_of(8, num_logprobs=3, **fields))
    expected_V = torch.log_softmax(LOGITS, dim=-1)
    assert sampled.token_id == 4
    assert sampled.logprobs is not None
    assert sampled.logprobs.logprob == expected_V[4].item()
    assert [logprob for _, logprob in sampled.logprobs.top] == expected_V.topk(3).values.tolist()
    assert sampled.logprobs.top[0][0] == 0


@pytest.mark.parametrize(("num_logprobs", "num_top"), [(0, 0), (2, 2), (8, 8), (20, 8), (-1, 8)])
def test_as_many_alternatives_as_asked_for_come_most_likely_first(num_logprobs: int, num_top: int) -> None:
    sampled = sample_one(LOGITS, state_of(8, num_logprobs=num_logprobs))
    assert sampled.logprobs is not None
    logprobs = [logprob for _, logprob in sampled.logprobs.top]
    assert len(logprobs) == num_top
    assert logprobs == sorted(logprobs, reverse=True)
    assert all(math.isclose(lp, torch.log_softmax(LOGITS, 0)[t].item()) for t, lp in sampled.logprobs.top)


def test_no_logprobs_unless_asked_for() -> None:
    assert sample_one(LOGITS, state_of(8)).logprobs is None
