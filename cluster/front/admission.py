"""What a request must satisfy before any router hears of it, and the choices it becomes. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.front.generate_call import GenerateCall, ResumedChoice
from cluster.front.journal import ChoicePlan
from router.sampling_params import MAX_SEED, WHOLE_VOCABULARY, SamplingParams

# Without max_tokens a choice gets the rest of the longest sequence, but no more than this.
MAX_DEFAULT_TOKENS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 1024
MAX_NAME_LENGTH = 256
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """What the service can do for any one request. max_logprobs -1: the whole vocabulary may be asked for."""

    max_model_len: int
    vocab_size: int
    max_logprobs: int
    max_choices: int
    max_request_bytes: int


def check_call(call: GenerateCall, limits: ServiceLimits) -> None:
    """What can be told before the prompt is tokenized. Raises ValueError naming field and value."""
    if call.num_bytes > limits.max_request_bytes:
        raise ValueError(f"the request has {call.num_bytes} bytes, the limit is {limits.max_request_bytes}")
    if not 1 <= call.n <= limits.max_choices:
        raise ValueError(f"n must be in [1, {limits.max_choices}], not {call.n}")
    if call.seed is not None and call.seed > MAX_SEED:
        raise ValueError(f"seed must be in [0, {MAX_SEED}], not {call.seed}")
    for name, value in (("request_id", call.request_id), ("cache_salt", call.cache_salt)):
        if len(value) > MAX_NAME_LENGTH or not value.isprintable():
            raise ValueError(f"{name} must be at most {MAX_NAME_LENGTH} printable characters, not {value[:80]!r}")
    _check_sampling(call.sampling, limits)
    _check_stop(call.stop)
    for index, choice in call.resumed.items():
        if not 0 <= index < call.n:
            raise ValueError(f"resume_token_ids.choice_index must be in [0, {call.n - 1}], not {index}")
        _check_ids(f"resume_token_ids[{index}].token_ids", choice.token_ids, limits)


def check_prompt(prompt_ids: Sequence[int], limits: ServiceLimits) -> None:
    """Raises ValueError naming field and value."""
    if not prompt_ids:
        raise ValueError("prompt must not be empty")
    if len(prompt_ids) >= limits.max_model_len:
        raise ValueError(
            f"prompt must have fewer tokens than max_model_len ({limits.max_model_len}), not {len(prompt_ids)}"
        )
    _check_ids("prompt", prompt_ids, limits)


def plan_choices(
    call: GenerateCall, prompt_ids: list[int], *, seed: int, engine_id: str, limits: ServiceLimits
) -> list[ChoicePlan]:
    """One plan for each of the n choices; each choice's own engine id is engine_id with its index.

    Raises ValueError naming field and value.
    """
    room = limits.max_model_len - len(prompt_ids)
    fields = _engine_fields(call.sampling, room)
    plans = []
    for index in range(call.n):
        resumed = call.resumed.get(index, ResumedChoice(token_ids=[], finished=False))
        if len(resumed.token_ids) > room:
            raise ValueError(f"resume_token_ids[{index}].token_ids must hold at most {room}, not more tokens")
        first_choice_only = {} if index == 0 else {"num_prompt_logprobs": None}
        plans.append(
            ChoicePlan(
                engine_id=f"{engine_id}/{index}",
                prompt_ids=prompt_ids,
                params=SamplingParams(**{**fields, **first_choice_only, "seed": seed, "choice_index": index}),
                resume_ids=resumed.token_ids,
                already_finished=resumed.finished,
                cache_salt=call.cache_salt,
                on_missing_expert=call.on_missing_expert,
            )
        )
    return plans


def _engine_fields(sampling: Mapping[str, Any], room: int) -> dict[str, Any]:
    """The API's fields under the engine's names; room: tokens that a choice can have."""
    renamed = {"logprobs": "num_logprobs", "prompt_logprobs": "num_prompt_logprobs"}
    fields = {renamed.get(name, name): value for name, value in sampling.items()}
    fields["max_tokens"] = min(fields.get("max_tokens", MAX_DEFAULT_TOKENS), room)
    return fields


def _check_sampling(sampling: Mapping[str, Any], limits: ServiceLimits) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        _check_logprobs(name, sampling.get(name), limits)
    _check_count("stop_token_ids", sampling.get("stop_token_ids", ()), MAX_STOP_TOKEN_IDS)
    _check_count("logit_bias", sampling.get("logit_bias", {}), MAX_LOGIT_BIASES)
    _check_ids("stop_token_ids", sampling.get("stop_token_ids", ()), limits)
    _check_ids("logit_bias", tuple(sampling.get("logit_bias", {})), limits)


def _check_stop(stop: Sequence[str]) -> None:
    _check_count("stop", stop, MAX_STOP_STRINGS)
    for index, text in enumerate(stop):
        if not 0 < len(text) <= MAX_STOP_LENGTH:
            raise ValueError(f"stop[{index}] must have 1 to {MAX_STOP_LENGTH} characters, not {len(text)}")


def _check_logprobs(name: str, value: int | None, limits: ServiceLimits) -> None:
    if value is None or limits.max_logprobs == WHOLE_VOCABULARY:
        return
    wanted = limits.vocab_size if value == WHOLE_VOCABULARY else value
    if not 0 <= wanted <= limits.max_logprobs:
        raise ValueError(f"{name} must be in [0, {limits.max_logprobs}], the limit of this service, not {value}")


def _check_count(name: str, values: Collection[object], limit: int) -> None:
    if len(values) > limit:
        raise ValueError(f"{name} must have at most {limit} entries, not {len(values)}")


def _check_ids(name: str, token_ids: Sequence[int], limits: ServiceLimits) -> None:
    """max() first: prompts may be long, and a good one is the rule."""
    if token_ids and max(token_ids) >= limits.vocab_size:
        index = next(i for i, token_id in enumerate(token_ids) if token_id >= limits.vocab_size)
        raise ValueError(f"{name}[{index}] must be a token id below {limits.vocab_size}, not {token_ids[index]}")
