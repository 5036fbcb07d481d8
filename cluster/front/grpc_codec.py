"""Protobuf messages to plain objects and back. Protobuf types stop here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.front.chat import ChatMessage, ContentPart, ImagePart, TextPart
from cluster.front.generate_call import (
    ChatPrompt,
    Chunk,
    GenerateCall,
    Prompt,
    ResumedChoice,
    TextPrompt,
    TokenPrompt,
    Usage,
)
from cluster.v1 import admin_pb2, generation_pb2
from router.messages import FinishReason, MissingExpertPolicy, TokenLogprobs

FINISH_REASONS = {
    None: generation_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: generation_pb2.FINISH_REASON_ABORT,
}
# Of SamplingParams, what the gateway itself sees to.
TEXT_FIELDS = frozenset({"stop", "include_stop_str_in_output"})
# Of AdminService.ListRequests.
DEFAULT_LISTED = 100
MAX_LISTED = 1000
POLICIES = {
    generation_pb2.ON_MISSING_EXPERT_WAIT: MissingExpertPolicy.WAIT,
    generation_pb2.ON_MISSING_EXPERT_FAIL: MissingExpertPolicy.FAIL,
    generation_pb2.ON_MISSING_EXPERT_SHARED_ONLY: MissingExpertPolicy.SHARED_ONLY,
}


def generate_call(request: generation_pb2.GenerateRequest) -> GenerateCall:
    """Raises ValueError for what cannot be understood; ranges are admission's matter."""
    return GenerateCall(
        prompt=prompt_of(request),
        num_bytes=request.ByteSize(),
        n=request.n if request.HasField("n") else 1,
        sampling=_set_fields(request.sampling),
        request_id=request.request_id,
        seed=request.seed if request.HasField("seed") else None,
        resumed=_resumed(request.resume_token_ids),
        on_missing_expert=_policy(request.on_missing_expert),
        cache_salt=request.cache_salt,
        weights_version=request.weights_version if request.HasField("weights_version") else None,
        stop=tuple(request.sampling.stop),
        include_stop_str_in_output=request.sampling.include_stop_str_in_output,
    )


def prompt_of(request: generation_pb2.GenerateRequest | generation_pb2.TokenizeRequest) -> Prompt:
    """Raises ValueError when none is set."""
    match request.WhichOneof("prompt"):
        case "text":
            return TextPrompt(text=request.text)
        case "token_ids":
            assert isinstance(request, generation_pb2.GenerateRequest)
            return TokenPrompt(token_ids=list(request.token_ids.ids))
        case "chat":
            return ChatPrompt(messages=tuple(_chat_message(message) for message in request.chat.messages))
        case _:
            fields = request.DESCRIPTOR.oneofs_by_name["prompt"].fields
            raise ValueError(f"prompt must be set: one of {', '.join(field.name for field in fields)}")


def _chat_message(message: generation_pb2.ChatMessage) -> ChatMessage:
    return ChatMessage(role=message.role, content=tuple(_content_part(part) for part in message.content))


def _content_part(part: generation_pb2.ContentPart) -> ContentPart:
    if part.WhichOneof("part") == "image":
        return ImagePart(data=part.image.data, url=part.image.url)
    return TextPart(text=part.text)


def _set_fields(sampling: generation_pb2.SamplingParams) -> dict[str, Any]:
    """What concerns the sampler."""
    fields: dict[str, Any] = {}
    for descriptor, value in sampling.ListFields():
        if descriptor.name in TEXT_FIELDS:
            continue
        if descriptor.name == "logit_bias":
            fields["logit_bias"] = dict(value)
        elif descriptor.name == "stop_token_ids":
            fields["stop_token_ids"] = tuple(value)
        else:
            fields[descriptor.name] = value
    return fields


def _resumed(choices: Sequence[generation_pb2.ResumedChoice]) -> dict[int, ResumedChoice]:
    resumed: dict[int, ResumedChoice] = {}
    for choice in choices:
        if choice.choice_index in resumed:
            raise ValueError(f"resume_token_ids.choice_index must be distinct, {choice.choice_index} comes twice")
        resumed[choice.choice_index] = ResumedChoice(token_ids=list(choice.token_ids), finished=choice.finished)
    return resumed


def _policy(value: generation_pb2.OnMissingExpert.ValueType) -> MissingExpertPolicy | None:
    if value == generation_pb2.ON_MISSING_EXPERT_UNSPECIFIED:
        return None
    if value not in POLICIES:
        known = ", ".join(generation_pb2.OnMissingExpert.Name(policy) for policy in POLICIES)
        raise ValueError(f"on_missing_expert must be one of {known}, not {_policy_name(value)}")
    return POLICIES[value]


def _policy_name(value: generation_pb2.OnMissingExpert.ValueType) -> str:
    known = generation_pb2.OnMissingExpert.DESCRIPTOR.values_by_number
    return known[value].name if value in known else str(value)


def generate_response(chunk: Chunk) -> generation_pb2.GenerateResponse:
    delta = chunk.delta
    return generation_pb2.GenerateResponse(
        request_id=chunk.request_id,
        seed=chunk.seed,
        weights_version=chunk.weights_version,
        choice_index=delta.choice_index,
        token_ids=delta.token_ids,
        text=chunk.text,
        logprobs=[_token_logprobs(entry) for entry in delta.logprobs],
        prompt_logprobs=[_token_logprobs(entry) for entry in delta.prompt_logprobs],
        finish_reason=FINISH_REASONS[delta.finish_reason],
        degraded=delta.degraded,
        usage=None if chunk.usage is None else _usage(chunk.usage),
    )


def _usage(usage: Usage) -> generation_pb2.Usage:
    return generation_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def _token_logprobs(entry: TokenLogprobs) -> generation_pb2.TokenLogprobs:
    return generation_pb2.TokenLogprobs(
        token_id=entry.token_id,
        logprob=entry.logprob,
        top_token_ids=[token_id for token_id, _ in entry.top],
        top_logprobs=[logprob for _, logprob in entry.top],
    )


def view_response(view: Mapping[str, Any]) -> admin_pb2.GetViewResponse:
    """view: as cluster.control.controller.Controller.get_view gives it."""
    return admin_pb2.GetViewResponse(
        epoch=view["epoch"],
        controller=admin_pb2.Member(**view["controller"]),
        gateways=[admin_pb2.Member(**member) for member in view["gateways"]],
        routers=[admin_pb2.Member(**member) for member in view["routers"]],
        shards=[_shard_member(**member) for member in view["shards"]],
        shard_growth=admin_pb2.ShardGrowth(**view["shard_growth"]),
        load=[
            admin_pb2.ExpertLoad(layer=layer, expert=expert, tokens=tokens) for layer, expert, tokens in view["load"]
        ],
        weights_version=view["weights_version"],
        model=view["model"],
        update=None if view["update"] is None else update_progress_response(view["update"]),
    )


def update_response(answer: Mapping[str, Any]) -> admin_pb2.UpdateWeightsResponse:
    """answer: as cluster.control.controller.Controller.update_weights gives it."""
    return admin_pb2.UpdateWeightsResponse(
        update_id=answer.get("update_id", ""),
        weights_version=answer.get("weights_version", 0),
        refusal=answer.get("refusal", ""),
        rooms=[admin_pb2.MemoryRoom(**room) for room in answer["rooms"]],
    )


def update_progress_response(progress: Mapping[str, Any]) -> admin_pb2.GetUpdateResponse:
    """progress: as cluster.control.updating.Updating.progress gives it."""
    return admin_pb2.GetUpdateResponse(**progress)


def max_requests_of(request: admin_pb2.ListRequestsRequest) -> int:
    """Raises ValueError."""
    if not 0 <= request.max_requests <= MAX_LISTED:
        raise ValueError(f"max_requests must be in [0, {MAX_LISTED}], not {request.max_requests}")
    return request.max_requests or DEFAULT_LISTED


def requests_response(found: Mapping[str, Any]) -> admin_pb2.ListRequestsResponse:
    """found: as cluster.control.controller.Controller.get_open_choices gives it."""
    return admin_pb2.ListRequestsResponse(
        num_open=found["num_open"], requests=[admin_pb2.OpenRequest(**choice) for choice in found["choices"]]
    )


def _shard_member(*, slots: Sequence[tuple[int, int]], **member: Any) -> admin_pb2.ShardMember:
    return admin_pb2.ShardMember(
        member=admin_pb2.Member(**member),
        slots=[admin_pb2.Slot(layer=layer, expert=expert) for layer, expert in slots],
    )
