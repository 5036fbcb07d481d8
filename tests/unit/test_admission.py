from typing import Any

import pytest

from cluster.front.admission import MAX_DEFAULT_TOKENS, ServiceLimits, check_call, check_prompt, plan_choices
from cluster.front.generate_call import GenerateCall, ResumedChoice, TokenPrompt

LIMITS = ServiceLimits(max_model_len=2048, vocab_size=100, max_logprobs=5, max_choices=4, max_request_bytes=1000)


def call(**fields: Any) -> GenerateCall:
    return GenerateCall(**{"prompt": TokenPrompt(token_ids=[1]), "num_bytes": 10, **fields})


def check(**fields: Any) -> None:
    """All that stands between a client and the routers."""
    checked = call(**fields)
    check_call(checked, LIMITS)
    plan_choices(checked, [1, 2], seed=1, engine_id="e", limits=LIMITS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_bytes": 1001}, "1001 bytes, the limit is 1000"),
        ({"n": 0}, r"n must be in \[1, 4\], not 0"),
        ({"n": 5}, r"n must be in \[1, 4\], not 5"),
        ({"seed": 2**63}, f"seed must be .* not {2**63}"),
        ({"request_id": "a" * 300}, "request_id must be at most 256"),
        ({"cache_salt": "a\n"}, r"cache_salt must be .* not 'a\\n'"),
        ({"sampling": {"temperature": float("nan")}}, "temperature must be .* not nan"),
        ({"sampling": {"temperature": -1.0}}, "temperature must be .* not -1"),
        ({"sampling": {"top_p": 1.5}}, "top_p must be .* not 1.5"),
        ({"sampling": {"top_k": -1}}, "top_k must be .* not -1"),
        ({"sampling": {"repetition_penalty": float("inf")}}, "repetition_penalty must be .* not inf"),
        ({"sampling": {"max_tokens": 0}}, "max_tokens must be at least 1, not 0"),
        ({"sampling": {"min_tokens": 9, "max_tokens": 4}}, "min_tokens must be between 0 and max_tokens, not 9"),
        ({"sampling": {"logprobs": 6}}, r"logprobs must be in \[0, 5\].*not 6"),
        ({"sampling": {"logprobs": -1}}, "logprobs must be .* not -1"),
        ({"sampling": {"prompt_logprobs": -2}}, "prompt_logprobs must be .* not -2"),
        ({"sampling": {"stop_token_ids": (3, 100)}}, r"stop_token_ids\[1\] must be a token id below 100, not 100"),
        ({"sampling": {"stop_token_ids": (1,) * 2000}}, "stop_token_ids must have at most 1024 entries, not 2000"),
        ({"stop": ("x",) * 17}, "stop must have at most 16 entries, not 17"),
        ({"stop": ("x", "")}, r"stop\[1\] must have 1 to 256 characters, not 0"),
        ({"stop": ("x" * 257,)}, r"stop\[0\] must have 1 to 256 characters, not 257"),
        ({"sampling": {"logit_bias": {100: 1.0}}}, r"logit_bias\[0\] must be a token id below 100, not 100"),
        ({"sampling": {"logit_bias": {1: float("nan")}}}, r"logit_bias\[1\] must be .* not nan"),
        ({"resumed": {1: ResumedChoice(token_ids=[1], finished=False)}}, "choice_index must be .* not 1"),
        ({"resumed": {0: ResumedChoice(token_ids=[100], finished=False)}}, r"resume_token_ids\[0\].* not 100"),
        ({"resumed": {0: ResumedChoice(token_ids=[1] * 2047, finished=False)}}, "must hold at most 2046"),
    ],
)
def test_each_mistake_is_named_with_its_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(**fields)


@pytest.mark.parametrize(
    ("prompt_ids", "message"),
    [
        ([], "prompt must not be empty"),
        ([1] * 2048, r"prompt must have fewer tokens than max_model_len \(2048\), not 2048"),
        ([1, 100, 200], r"prompt\[1\] must be a token id below 100, not 100"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused(prompt_ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_prompt(prompt_ids, LIMITS)


def test_the_longest_prompt_leaves_room_for_one_token() -> None:
    prompt_ids = [1] * 2047
    check_prompt(prompt_ids, LIMITS)
    [plan] = plan_choices(call(), prompt_ids, seed=1, engine_id="e", limits=LIMITS)
    assert plan.params.max_tokens == 1


def test_without_max_tokens_a_choice_gets_the_rest_up_to_a_bound() -> None:
    [short] = plan_choices(call(), [1, 2], seed=1, engine_id="e", limits=LIMITS)
    [long] = plan_choices(call(), [1] * 2000, seed=1, engine_id="e", limits=LIMITS)
    assert (short.params.max_tokens, long.params.max_tokens) == (MAX_DEFAULT_TOKENS, 48)


def test_choices_differ_in_index_and_name_and_only_the_first_tells_of_the_prompt() -> None:
    wanted = call(n=2, sampling={"logprobs": 2, "prompt_logprobs": 1, "temperature": 0.5})
    first, second = plan_choices(wanted, [1, 2], seed=9, engine_id="e", limits=LIMITS)
    assert (first.engine_id, second.engine_id) == ("e/0", "e/1")
    assert (first.params.choice_index, second.params.choice_index) == (0, 1)
    assert (first.params.seed, second.params.seed) == (9, 9)
    assert (first.params.num_prompt_logprobs, second.params.num_prompt_logprobs) == (1, None)
    assert first.params.num_logprobs == second.params.num_logprobs == 2


def test_each_choice_resumes_from_its_own_tokens() -> None:
    resumed = {1: ResumedChoice(token_ids=[4, 5], finished=True)}
    first, second = plan_choices(call(n=2, resumed=resumed), [1], seed=9, engine_id="e", limits=LIMITS)
    assert (first.resume_ids, first.already_finished) == ([], False)
    assert (second.resume_ids, second.already_finished) == ([4, 5], True)


def test_a_service_may_allow_log_probabilities_of_the_whole_vocabulary() -> None:
    limits = ServiceLimits(max_model_len=64, vocab_size=100, max_logprobs=-1, max_choices=1, max_request_bytes=1000)
    check_call(call(sampling={"logprobs": -1}), limits)
