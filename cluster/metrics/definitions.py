"""Every metric of the service: its name, type, meaning, labels and buckets, and nowhere else.

Names that begin with ``vllm:`` mean what they mean in vLLM, where a choice is a request of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

Labels = tuple[str, ...]


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """name: a counter's without its ``_total``. buckets: upper bounds, ascending, without infinity.

    per_member: one series for each living process, with its id as label ``member``; other metrics are summed over all
    processes, counters and histograms also over those that are gone. labels come after ``member``; series of
    initial_labels are there from the start.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    initial_labels: tuple[Labels, ...] = ()
    buckets: tuple[float, ...] = ()
    per_member: bool = False

    def __post_init__(self) -> None:
        assert bool(self.buckets) == (self.kind is Kind.HISTOGRAM), self.name
        assert not (self.per_member and self.kind is Kind.HISTOGRAM), f"{self.name}: histograms are summed"

    @property
    def series_names(self) -> tuple[str, ...]:
        """As a query names them."""
        match self.kind:
            case Kind.COUNTER:
                return (f"{self.name}_total",)
            case Kind.GAUGE:
                return (self.name,)
            case Kind.HISTOGRAM:
                return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))


def _counter(name: str, help: str, labels: tuple[str, ...] = (), initial_labels: tuple[Labels, ...] = ()) -> Metric:
    return Metric(name=name, kind=Kind.COUNTER, help=help, labels=labels, initial_labels=initial_labels)


def _member_counter(name: str, help: str) -> Metric:
    return Metric(name=name, kind=Kind.COUNTER, help=help, per_member=True)


def _gauge(name: str, help: str, labels: tuple[str, ...] = ()) -> Metric:
    return Metric(name=name, kind=Kind.GAUGE, help=help, labels=labels)


def _member_gauge(name: str, help: str) -> Metric:
    return Metric(name=name, kind=Kind.GAUGE, help=help, per_member=True)


def _histogram(name: str, help: str, buckets: tuple[float, ...]) -> Metric:
    return Metric(name=name, kind=Kind.HISTOGRAM, help=help, buckets=buckets)


_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_TOKENS = tuple(float(mantissa * 10**exponent) for exponent in range(6) for mantissa in (1, 2, 5))

# Measured by gateways.

PROMPT_TOKENS = _counter(
    "vllm:prompt_tokens", "Tokens of prompts that were computed: of each request once, with its first token."
)
GENERATION_TOKENS = _counter("vllm:generation_tokens", "Tokens sent to clients, over all choices.")
REQUEST_SUCCESS = _counter(
    "vllm:request_success",
    "Choices that ended, by reason; abort: the client left. Failed requests are in arriero:request_errors.",
    ("finished_reason",),
    (("stop",), ("length",), ("abort",)),
)
TIME_TO_FIRST_TOKEN = _histogram(
    "vllm:time_to_first_token_seconds", "From a request's arrival to its first token, of any choice.", _FIRST_TOKEN_S
)
INTER_TOKEN_LATENCY = _histogram(
    "vllm:inter_token_latency_seconds",
    "Between two tokens of a choice, each but its first; tokens sent together share their time evenly.",
    _TOKEN_S,
)
REQUEST_LATENCY = _histogram(
    "vllm:e2e_request_latency_seconds", "From a request's arrival to its end, of those that were answered.", _REQUEST_S
)
REQUEST_QUEUE_TIME = _histogram(
    "vllm:request_queue_time_seconds",
    "From a choice's submission to the beginning of its first step, in whatever queue.",
    _REQUEST_S,
)
REQUEST_PROMPT_TOKENS = _histogram(
    "vllm:request_prompt_tokens", "Prompt tokens of requests that were answered.", _TOKENS
)
REQUEST_GENERATION_TOKENS = _histogram(
    "vllm:request_generation_tokens", "Tokens sent for each choice of requests that were answered.", _TOKENS
)
REQUEST_ERRORS = _counter("arriero:request_errors", "Requests refused or failed, by the client's code.", ("code",))
RESUBMISSIONS = _counter("arriero:resubmissions", "Choices given to another router after theirs was lost.")
LATE_OUTPUTS = _counter("arriero:late_outputs", "Outputs of routers for attempts that had been given up.")
REFUSED_TOKEN_CONNECTIONS = _counter("arriero:refused_token_connections", "Connections that were no router's of ours.")
OPEN_CHOICES = _member_gauge("arriero:open_choices", "Choices that a gateway has accepted and not ended.")

GATEWAY_METRICS = (
    PROMPT_TOKENS, GENERATION_TOKENS, REQUEST_SUCCESS, TIME_TO_FIRST_TOKEN, INTER_TOKEN_LATENCY, REQUEST_LATENCY,
    REQUEST_QUEUE_TIME, REQUEST_PROMPT_TOKENS, REQUEST_GENERATION_TOKENS, REQUEST_ERRORS, RESUBMISSIONS, LATE_OUTPUTS,
    REFUSED_TOKEN_CONNECTIONS, OPEN_CHOICES,
)  # fmt: skip

# Measured by routers' engines.

REQUESTS_RUNNING = _member_gauge("vllm:num_requests_running", "Sequences that a router's steps advance.")
REQUESTS_WAITING = _member_gauge("vllm:num_requests_waiting", "Sequences that wait in a router's engine.")
KV_CACHE_USAGE = _member_gauge("vllm:kv_cache_usage_perc", "Share of a router's KV blocks in use, of the fuller group.")
PREEMPTIONS = _counter("vllm:num_preemptions", "Sequences that gave their blocks back to be computed anew.")
PREFIX_CACHE_QUERIES = _counter("vllm:prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache.")
PREFIX_CACHE_HITS = _counter("vllm:prefix_cache_hits", "Prompt tokens that were taken from the prefix cache.")
ENGINE_STEPS = _counter("arriero:engine_steps", "Steps of all engines.")
DEGRADED_TOKENS = _counter("arriero:degraded_tokens", "Tokens computed without one of their experts.")
WAITING_TOKENS = _member_gauge(
    "arriero:waiting_tokens", "Tokens a router must compute before its sequences can sample."
)
LOST_SHARDS = _member_gauge("arriero:lost_shards", "Shards that a router has lost.")
STEP_SECONDS = _member_gauge("arriero:current_step_seconds", "How long a router's step under way has taken so far.")

ROUTER_METRICS = (
    REQUESTS_RUNNING, REQUESTS_WAITING, KV_CACHE_USAGE, PREEMPTIONS, PREFIX_CACHE_QUERIES, PREFIX_CACHE_HITS,
    ENGINE_STEPS, DEGRADED_TOKENS, WAITING_TOKENS, LOST_SHARDS, STEP_SECONDS,
)  # fmt: skip

# Measured by shards.

SHARD_BUSY_SECONDS = _member_counter("arriero:shard_busy_seconds", "Time that a shard has spent computing.")
SHARD_LANES = _member_gauge("arriero:shard_lanes", "Routers that are connected to a shard.")
REFUSED_LANES = _counter(
    "arriero:refused_lanes", "Lanes that shards closed for what they sent, by reason.", ("reason",)
)
REFUSED_ROWS = _counter("arriero:refused_row_requests", "Requests for rows that shards refused: another epoch, mostly.")

SHARD_METRICS = (SHARD_BUSY_SECONDS, SHARD_LANES, REFUSED_LANES, REFUSED_ROWS)

# Measured by more than one kind of process.

EXPERT_ROWS = _member_counter("arriero:expert_rows", "Rows computed by the experts of a shard, or of a router without.")
RESIDENT_MEMORY = _member_gauge(
    "arriero:process_resident_memory_bytes", "Memory of a member's process; a router's is its engine's."
)

SHARED_METRICS = (EXPERT_ROWS, RESIDENT_MEMORY)

# Known to the controller.

EPOCH = _gauge("arriero:epoch", "Number of the epoch in force, 0 before the first.")
MEMBERS = _gauge("arriero:members", "Processes of the service, by kind and state.", ("kind", "state"))
EXPERT_LOAD_IMBALANCE = _gauge(
    "arriero:expert_load_imbalance",
    "How unevenly a layer's experts were asked for since the start: (max - mean) / mean.",
    ("layer",),
)
SHARD_GROWTH = _gauge(
    "arriero:shard_growth", "1 for how the number of shards stands to the load, 0 for the others.", ("state",)
)
SHARD_BUSY_FRACTION = _gauge(
    "arriero:shard_busy_fraction", "Part of the time that shards compute, of late and on average."
)

CONTROLLER_METRICS = (EPOCH, MEMBERS, EXPERT_LOAD_IMBALANCE, SHARD_GROWTH, SHARD_BUSY_FRACTION)

METRICS = GATEWAY_METRICS + ROUTER_METRICS + SHARD_METRICS + SHARED_METRICS + CONTROLLER_METRICS
