"""The plain messages between gateway, router replica and engine process, and their one encoding (MessagePack).

Three conversations use them:
- replica -> engine process, over the pipe the process is born with: Start, Add, Abort, PrepareEpoch, AdoptEpoch,
  AbandonEpoch, Shutdown;
- engine process -> replica, over the same pipe: Ready or Failed, then Finished, Heartbeat, EpochPrepared, LanesChanged;
- engine process -> gateway, over one TCP connection per gateway: TokenBatches, mostly one per step;
- gateway -> engine process, over the same connection: Aborts.
Decoding validates every field's type; what does not fit, or is no MessagePack, raises msgspec.DecodeError.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

import msgspec

from experts.expert_dtype import ExpertDtypeChoice
from experts.logs import LogSettings
from experts.transport.names import LaneTransport
from router.sampling_params import SamplingParams


class MissingExpertPolicy(StrEnum):
    """What to do with a token whose expert is on no living shard: wait for a new copy, end the request, or go on with
    the shared expert alone."""

    WAIT = "wait"
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
    """One choice of one client request, as the engine takes it. Each choice has a request_id of its own.

    resume_ids are output tokens the client already holds: they count as output (penalties, max_tokens, noise
    position) but are not sent again. attempt numbers the submissions of one request_id; outputs carry it, so
    that a late reply of an old attempt is told apart. return_address is the gateway's token listener
    ("host:port"); an empty one keeps the outputs with the caller of Engine.step. weights_version is what finds the
    request its engine; an engine has one.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    attempt: int = 0
    resume_ids: list[int] = []
    cache_salt: str = ""
    return_address: str = ""
    weights_version: int = 0
    on_missing_expert: MissingExpertPolicy | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log probabilities at one position, natural log, of the raw logits. top is sorted, most likely first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class SequenceOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step brought one request. One with a return_address gets an output of its first step even if that
    brought no token yet.

    prompt_logprobs comes whole, with the first token; its entry i belongs to prompt position i and the first
    is None. logprobs, when asked for, has one entry per token of token_ids. error and error_code are set
    exactly when finish_reason is ERROR. degraded: a token of this request was computed without its routed
    expert, now or earlier. num_cached_tokens: prompt tokens taken from the prefix cache. since_begin_s: in a
    request's first output, how long ago its first step began.
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
    since_begin_s: float | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the engine between two steps.

    num_waiting_tokens: tokens that waiting and running sequences still have to compute before they can sample.
    num_parked: of the running and waiting ones, those that wait for an expert.
    Blocks are by group, "global" and "local", without the null block; free ones may be cached. expert_load:
    (layer, expert, tokens routed there) of experts in this process; shards count their own.
    """

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
    num_parked: int = 0


class RequestAttempt(msgspec.Struct, frozen=True, kw_only=True):
    """Which submission of which request."""

    request_id: str
    attempt: int


class TokenBatch(msgspec.Struct, frozen=True, kw_only=True):
    """What there is for one gateway: the outputs of one step, or requests that the engine has just taken (begun). A
    gateway answers with an Abort where it does not know, or know any more, of a request."""

    router_id: str
    outputs: list[SequenceOutput] = []
    begun: list[RequestAttempt] = []


MicroBatchMode = Literal["auto", "on", "off"]


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an operator decides about one engine.

    num_threads are torch's. block_size None is the default for the model's attention chunk; num_kv_blocks None is
    what fits into kv_memory_share of the memory that is free once the weights are loaded (None: a share that suits
    the device). lane_timeout_s bounds the wait for one shard, lane_silence_s that for a sign that it is at
    work, expert_wait_s that for an expert without a living shard; lane_spin_us is how long to look for rows before
    sleeping (None: what suits the host). expert_dtype is of experts in this process.
    """

    model: str
    dtype: Literal["float32", "bfloat16"]
    max_model_len: int
    device: str = "cpu"
    num_threads: int = 1
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 64
    max_logprobs: int = 20
    block_size: int | None = None
    num_kv_blocks: int | None = None
    kv_memory_share: float | None = None
    on_missing_expert: MissingExpertPolicy = MissingExpertPolicy.WAIT
    expert_wait_s: float = 120.0
    lane_timeout_s: float = 30.0
    lane_silence_s: float = 1.0
    log: LogSettings = LogSettings()
    lane_transport: LaneTransport = "auto"
    lane_spin_us: int | None = None
    micro_batches: MicroBatchMode = "auto"
    expert_dtype: ExpertDtypeChoice = "auto"


class Start(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """First message to an engine process. epoch is experts.epoch.Epoch as a plain dict; None means that the
    experts live in the engine process itself. secret opens lanes and token links."""

    router_id: str
    settings: EngineSettings
    secret: bytes
    weights_version: int
    epoch: dict[str, Any] | None


class Add(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    request: GenerateRequest


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Nobody waits for this attempt any more. Of one that is not open it means nothing."""

    request_id: str
    attempt: int


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


class PrepareEpoch(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Open links for this epoch (experts.epoch.Epoch as a plain dict) in the background; answered by EpochPrepared.
    The preparation of another one ends."""

    epoch: dict[str, Any]


class AdoptEpoch(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Go over to this epoch, which must be prepared, between two steps; answered by LanesChanged."""

    number: int


class AbandonEpoch(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The preparation of this epoch was for nothing."""

    number: int


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine serves. capacity is a sentence for the log: what fits in the KV cache."""

    pid: int
    capacity: str


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine cannot start or had to stop; error names the cause."""

    error: str


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request has ended. Its last TokenBatch was handed to the gateway's connection before this went to the
    pipe, yet the two travel apart and this may arrive first: only the finish_reason in the token stream ends it.

    suspect: set by the replica of an engine that is silent or gone; what the replica is called, for whoever asks
    elsewhere.
    """

    request_id: str
    attempt: int
    finish_reason: FinishReason
    error: str | None = None
    error_code: ErrorCode | None = None
    suspect: str | None = None


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sent twice a second, from a thread of its own. step_s is how long the step under way has taken so far, 0
    between steps; step is its number, from 1, or that of the last one. stats are older: of before the step."""

    stats: EngineStats
    step_s: float
    step: int


class EpochPrepared(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The epoch can be adopted. unreachable: shards that could not be connected to, and why."""

    number: int
    unreachable: dict[str, str]


class LanesChanged(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The epoch in use, and which of its shards are given up, with reasons. Sent when either has changed."""

    epoch: int
    lost: dict[str, str]


ToEngine = Start | Add | Abort | PrepareEpoch | AdoptEpoch | AbandonEpoch | Shutdown
FromEngine = Ready | Failed | Finished | Heartbeat | EpochPrepared | LanesChanged


def encode(message: ToEngine | FromEngine | TokenBatch | GenerateRequest) -> bytes:
    return msgspec.msgpack.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    message: ToEngine = msgspec.msgpack.decode(data, type=ToEngine)
    return message


def decode_from_engine(data: bytes) -> FromEngine:
    message: FromEngine = msgspec.msgpack.decode(data, type=FromEngine)
    return message


def decode_request(data: bytes) -> GenerateRequest:
    return msgspec.msgpack.decode(data, type=GenerateRequest)


def decode_finished(data: bytes) -> Finished:
    return msgspec.msgpack.decode(data, type=Finished)


def decode_abort(data: bytes) -> Abort:
    return msgspec.msgpack.decode(data, type=Abort)


def decode_token_batch(data: bytes) -> TokenBatch:
    return msgspec.msgpack.decode(data, type=TokenBatch)
