"""What the engine refuses before a request becomes a sequence. Each error names field and value."""

from __future__ import annotations

from collections.abc import Iterable

from router.engine_limits import EngineLimits
from router.messages import GenerateRequest
from router.sampling_params import WHOLE_VOCABULARY, SamplingParams


def check_request(
    request: GenerateRequest, *, vocab_size: int, eos_token_ids: Iterable[int], limits: EngineLimits
) -> None:
    """Raises ValueError. What SamplingParams says about itself has been checked when it was made."""
    _check_lengths(request, limits)
    _check_tokens("prompt_ids", request.prompt_ids, vocab_size)
    _check_tokens("resume_ids", request.resume_ids, vocab_size)
    _check_tokens("stop_token_ids", request.params.stop_token_ids, vocab_size)
    _check_tokens("logit_bias", request.params.logit_bias, vocab_size)
    _check_num_logprobs("num_logprobs", request.params.num_logprobs, vocab_size, limits)
    _check_num_logprobs("num_prompt_logprobs", request.params.num_prompt_logprobs, vocab_size, limits)
    _check_something_to_sample(request.params, eos_token_ids, vocab_size)


def _check_lengths(request: GenerateRequest, limits: EngineLimits) -> None:
    num_prompt_tokens = len(request.prompt_ids)
    if not num_prompt_tokens:
        raise ValueError("prompt_ids must not be empty")
    if num_prompt_tokens >= limits.max_model_len:
        raise ValueError(
            f"prompt_ids has {num_prompt_tokens} tokens, max_model_len {limits.max_model_len} leaves room "
            f"for {limits.max_model_len - 1} and one of output"
        )


def _check_tokens(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    token_ids = tuple(token_ids)
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise ValueError(f"{field} has token id {wrong}, the vocabulary is 0 to {vocab_size - 1}")


def _check_num_logprobs(field: str, number: int | None, vocab_size: int, limits: EngineLimits) -> None:
    wanted = vocab_size if number == WHOLE_VOCABULARY else number or 0
    if limits.max_logprobs != WHOLE_VOCABULARY and wanted > limits.max_logprobs:
        raise ValueError(f"{field} must be at most {limits.max_logprobs}, not {number}")


def _check_something_to_sample(params: SamplingParams, eos_token_ids: Iterable[int], vocab_size: int) -> None:
    end_token_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
    if params.min_tokens and len(end_token_ids) >= vocab_size:
        raise ValueError(f"min_tokens {params.min_tokens} leaves no token to sample: stop_token_ids names all")
