"""The plain messages between gateway, router replica and engine process, and their one encoding (MessagePack).

Three conversations use them:
- replica -> engine process, over the pipe the process is born with: Start, Add, Abort, Shutdown;
- engine process -> replica, over the same pipe: Ready or Failed, then Finished and Stats;
- engine process -> gateway, over one TCP connection per gateway: one TokenBatch per step.
Decoding validates every field's type; a message that does not fit raises msgspec.ValidationError.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from router.sampling_params import SamplingParams


class MissingExpertPolicy(StrEnum):
    """What to do with a token whose expert cannot be reached (design §4)."""

    FAIL = "fail"
    SHARED_ONLY = "shared_only"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class ErrorCode(StrEnum):
    """The subset of gRPC's codes that an engine can end a request with."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAVAILABLE = "UNAVAILABLE"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    INTERNAL = "INTERNAL"


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of one client request, as the engine takes it.

    resume_ids are output tokens the client already holds: they count as output (penalties, max_tokens, noise
    position) but are not sent again. attempt numbers the submissions of one request_id; outputs carry it, so
    that a late reply of an old attempt is told apart. return_address is the gateway's token listener
    ("host:port"); an empty one keeps the outputs with the caller of Engine.step.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    attempt: int = 0
    resume_ids: list[int] = []
    cache_salt: str = ""
    return_address: str = ""
    on_missing_expert: MissingExpertPolicy | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log probabilities at one position, natural log, of the raw logits. top is sorted, most likely first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class SequenceOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one step brought one request.

    prompt_logprobs comes whole, with the first output; its entry i belongs to prompt position i and the first
    is None. logprobs, when asked for, has one entry per token of token_ids. error and error_code are set
    exactly when finish_reason is ERROR. degraded: a token of this request was computed without its routed
    expert, now or earlier. num_cached_tokens: prompt tokens taken from the prefix cache.
    """

    request_id: str
    attempt: int
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    error_code: ErrorCode | None = None
    degraded: bool = False
    num_cached_tokens: int = 0


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the engine, sent as a heartbeat."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_free_blocks: dict[str, int]
    num_blocks: dict[str, int]
    num_steps: int
    num_preemptions: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int
    num_degraded_tokens: int
    lost_shards: dict[str, str]
    expert_load: list[tuple[int, int, int]]


class TokenBatch(msgspec.Struct, frozen=True, kw_only=True):
    """All outputs of one step for one gateway."""

    router_id: str
    outputs: list[SequenceOutput]


class Start(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """First message to an engine process. epoch is experts.epoch.Epoch as a plain dict; None means that the
    experts live in the engine process itself. secret opens lanes and token links."""

    router_id: str
    model: str
    dtype: str
    device: str
    num_threads: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_logprobs: int
    block_size: int | None
    num_kv_blocks: int | None
    on_missing_expert: MissingExpertPolicy
    lane_timeout_s: float
    weights_version: int
    secret: bytes
    epoch: dict[str, object] | None


class Add(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    request: GenerateRequest


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    request_id: str
    attempt: int


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine serves. capacity is a sentence for the log: what fits in the KV cache."""

    pid: int
    capacity: str


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine cannot start or had to stop; error names the cause."""

    error: str


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request has ended; its last outputs went to the gateway before this was sent."""

    request_id: str
    attempt: int
    finish_reason: FinishReason
    error: str | None = None
    error_code: ErrorCode | None = None


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    stats: EngineStats


ToEngine = Start | Add | Abort | Shutdown
FromEngine = Ready | Failed | Finished | Heartbeat


def encode(message: ToEngine | FromEngine | TokenBatch) -> bytes:
    return msgspec.msgpack.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    message: ToEngine = msgspec.msgpack.decode(data, type=ToEngine)
    return message


def decode_from_engine(data: bytes) -> FromEngine:
    message: FromEngine = msgspec.msgpack.decode(data, type=FromEngine)
    return message


def decode_token_batch(data: bytes) -> TokenBatch:
    return msgspec.msgpack.decode(data, type=TokenBatch)
