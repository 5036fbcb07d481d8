"""What a client may not ask for, and that each refusal names field and value."""

from __future__ import annotations

import math
from typing import Any

import pytest

from router.messages import GenerateRequest, decode_request, encode
from router.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", value) for value in (-0.1, 100.5, math.nan, math.inf, -math.inf)],
        *[("top_p", value) for value in (0.0, -0.5, 1.01, math.nan, math.inf)],
        *[("min_p", value) for value in (-0.01, 1.01, math.nan)],
        *[("repetition_penalty", value) for value in (0.0, -1.0, 101.0, math.nan, math.inf)],
        *[(name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1, math.nan)],
        ("top_k", -1),
        ("seed", -1),
        ("seed", 2**63),
        ("choice_index", -1),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("num_logprobs", -2),
        ("num_prompt_logprobs", -2),
    ],
)
def test_a_value_out_of_range_is_refused_by_name_and_value(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must be .*, not {value}$"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("bias", [-100.5, 101.0, math.nan, math.inf])
def test_a_bias_out_of_range_is_refused_by_its_token(bias: float) -> None:
    with pytest.raises(ValueError, match=rf"^logit_bias\[7\] must be in \[-100, 100\], not {bias}$"):
        SamplingParams(logit_bias={7: bias})


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 100.0, "top_p": 1.0, "min_p": 1.0, "seed": 2**63 - 1},
        {"repetition_penalty": 0.01, "presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"logit_bias": {3: -100.0, 4: 100.0}, "stop_token_ids": (5, 6), "num_logprobs": -1},
        {"min_tokens": 5, "max_tokens": 5, "num_prompt_logprobs": 0, "choice_index": 3},
    ],
)
def test_values_at_the_limits_are_taken_and_survive_the_wire(fields: dict[str, Any]) -> None:
    request = GenerateRequest(request_id="r", prompt_ids=[1], params=SamplingParams(**fields))
    assert decode_request(encode(request)) == request


def test_only_temperatures_next_to_zero_are_greedy() -> None:
    assert SamplingParams(temperature=0.0).is_greedy
    assert SamplingParams(temperature=1e-6).is_greedy
    assert not SamplingParams(temperature=0.01).is_greedy
