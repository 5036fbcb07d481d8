"""The one definition of what a service can be told: the flags of `arriero serve`, its YAML file, and the `args`
of `serve deploy` are all this class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cluster.checkpoints.demo_model import demo_checkpoint
from experts.expert_dtype import ExpertDtypeChoice
from experts.logs import LogSettings
from experts.transport.names import LaneTransport

APP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
MAX_PORT = 65535
# Without a router_prefix_gap: as which part of a batch it counts to find a whole prompt in the cache.
PREFIX_PART = 4


class ConfigError(ValueError):
    """The configuration is wrong; the message names each key and what it should be."""


class ServiceConfig(BaseModel):
    """Everything about one service that its operator decides. Every field's description is its help text.

    None means that the service decides, from the checkpoint and the machine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    model: str = Field(
        default_factory=lambda: str(demo_checkpoint()), min_length=1, description="Checkpoint folder, or the id of a "
        "model on the Hugging Face hub. Default: the demo model that comes with Arriero.",
    )  # fmt: skip
    chat_template: str | None = Field(
        None, min_length=1, description="Jinja file that renders chats, at the same path on every node. Default: Llama "
        "4's own format, not the checkpoint's template.",
    )  # fmt: skip
    served_model_name: str | None = Field(
        None, min_length=1, description="The model's name over HTTP. Default: its id on the hub, or its folder's name."
    )
    app_name: str = Field("arriero", description="Name of the Serve application; two names can share a cluster.")

    shards: int = Field(2, ge=0, description="Expert shard processes. 0: the experts live in each router process.")
    max_shards: int | None = Field(
        None, ge=1, description="Shards that there may be under load; without load there are as many as shards, or the "
        "last `arriero scale`, says. Default: no load changes their number.",
    )  # fmt: skip
    routers: int = Field(1, ge=1, description="Router processes: attention, KV cache, scheduler and sampler.")
    max_routers: int | None = Field(
        None, ge=1, description="Routers that there may be under load; without load there are as many as routers says. "
        "Default: routers, always.",
    )  # fmt: skip
    gateways: int = Field(1, ge=1, description="Gateway processes: the gRPC and HTTP surface, the tokenizer.")
    copies: int = Field(1, ge=1, description="Shards that hold each expert. At most the number of shards.")

    http_host: str = Field("127.0.0.1", description="Interface on which HTTP listens.")
    http_port: int = Field(8000, ge=1, le=MAX_PORT, description="Port of HTTP.")
    grpc_port: int = Field(9000, ge=1, le=MAX_PORT, description="Port of gRPC.")

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of weights and KV cache. auto: as the checkpoint says."
    )
    expert_dtype: ExpertDtypeChoice = Field(
        "auto", description="As what routed experts are kept. auto: as dtype says. int8, int4: as whole numbers with "
        "scales, for half or a quarter of the memory and a small error.",
    )  # fmt: skip
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where routers and shards compute. cuda is unmeasured.")
    max_model_len: int | None = Field(
        None, ge=2, description="Longest sequence, prompt and output together, in tokens. Default: what the model "
        "was made for, but at most 8192.",
    )  # fmt: skip
    max_num_batched_tokens: int = Field(2048, ge=1, description="Tokens that one step of a router may compute.")
    max_num_seqs: int = Field(
        64, ge=1, description="Sequences that one step of a router may advance; never more than its tokens."
    )
    max_queued_requests: int = Field(
        256, ge=1, description="Requests that may wait at each gateway once all routers are full; more are refused."
    )
    num_kv_blocks: int | None = Field(
        None, ge=1, description="KV cache blocks of each router. Default: what fits in the memory at hand."
    )
    block_size: int | None = Field(
        None, ge=1, description="Tokens of a KV cache block; must divide the model's attention chunk. Default: the "
        "largest divisor up to 16.",
    )  # fmt: skip
    seed: int | None = Field(
        None, ge=0, description="Makes the seeds reproducible that gateways draw for requests without one."
    )
    max_logprobs: int = Field(
        20, ge=-1, description="Most likely tokens per position that a request may ask for. -1: the whole vocabulary."
    )
    max_choices: int = Field(64, ge=1, description="Choices that one request may ask for: n of each of its prompts.")
    max_request_bytes: int = Field(16 * 2**20, ge=1024, description="Largest request, in bytes.")
    stream_interval_ms: int = Field(
        20, ge=0, description="After the first token a stream gets at most one message in this time. 0: every step."
    )

    on_missing_expert: Literal["wait", "fail", "shared_only"] = Field(
        "wait", description="When no living shard has an expert. wait: until another one has it, expert_wait_s at "
        "most. fail: end the request with UNAVAILABLE. shared_only: go on with the shared expert alone and flag the "
        "response.",
    )  # fmt: skip
    expert_wait_s: float = Field(
        120.0, gt=0, description="How long a request waits for an expert that no living shard has."
    )
    lane_timeout_s: float = Field(
        30.0, gt=0, description="How long a router waits for a shard's answer before it takes the shard for lost."
    )
    lane_silence_s: float = Field(
        1.0, gt=0, description="A shard that owes a router rows and shows no sign of work for so long is routed "
        "around. Raise it where one tile of 256 rows takes more than a quarter of it.",
    )  # fmt: skip
    lane_transport: LaneTransport = Field(
        "auto", description="How rows travel between routers and shards. auto: by shared memory on one host, by TCP "
        "between hosts. shm, tcp: in that way alone.",
    )  # fmt: skip
    lane_spin_us: int | None = Field(
        None, ge=0, le=100_000, description="How long routers and shards look for rows before they go to sleep, in "
        "microseconds. Default: by the machine's cores.",
    )  # fmt: skip
    micro_batches: Literal["auto", "on", "off"] = Field(
        "auto", description="Whether routers cut long steps in two, one half computing while the other is with the "
        "experts. auto: where it was measured to pay. on: always. off: never.",
    )  # fmt: skip
    resubmit_timeout_s: float = Field(
        60.0, gt=0, description="How long a gateway looks for another router when a request's own is lost."
    )
    start_timeout_s: float = Field(
        1800.0, gt=0, description="How long placing a process and loading its weights may take."
    )
    rebalance_period_s: float = Field(
        0.0, ge=0, description="Time between two rebalances that the service begins by itself. 0: it never does."
    )
    rebalance_stall_s: float = Field(
        120.0, gt=0, description="How long a rebalance may stand still, no expert loaded, before it is rolled back."
    )
    shard_busy_target: float = Field(
        0.6, gt=0, lt=1, description="Part of the time that shards should compute, on average; where it is more there "
        "is one more, up to max_shards.",
    )  # fmt: skip
    shard_up_delay_s: float = Field(
        30.0, ge=0, description="How long shards must have been too busy before there is one more."
    )
    shard_down_delay_s: float = Field(
        600.0,
        ge=0,
        description="How long one shard fewer must have been enough, with a sixth to spare, before one goes.",
    )
    router_kv_target: float = Field(
        0.7, gt=0, le=1, description="Part of their KV cache that routers should use at most; with more in use there "
        "are more, up to max_routers.",
    )  # fmt: skip
    router_seat_target: float = Field(
        0.8, gt=0, description="Requests that each router should have at most, those in queues shared out, as a part "
        "of max_num_seqs; see router_kv_target.",
    )  # fmt: skip
    router_waiting_target: int | None = Field(
        None, ge=1, description="Tokens that should at most wait at each router to be computed; see router_kv_target. "
        "Default: twice max_num_batched_tokens.",
    )  # fmt: skip
    router_up_delay_s: float = Field(
        30.0, ge=0, description="How long routers must have been too few before there are more."
    )
    router_down_delay_s: float = Field(
        600.0, ge=0, description="How long fewer routers must have been enough, with a fifth to spare, before some go. "
        "Their streams end first, within drain_timeout_s.",
    )  # fmt: skip
    router_prefix_gap: int | None = Field(
        None, ge=0, description="How many requests more than the least busy router one may have and still get a "
        "request whose prompt is in its prefix cache; with a part of the prompt, that part of it. 0: prefixes do not "
        "count. Default: a quarter of max_num_seqs.",
    )  # fmt: skip
    drain_timeout_s: float = Field(
        120.0, gt=0, description="How long open requests may go on when the service or a process is told to stop."
    )
    heartbeat_s: float = Field(0.5, gt=0, le=5, description="Time between two looks at each process.")
    app_gone_s: float = Field(
        30.0, ge=0, description="How long the application must be gone from Serve before the shards are removed."
    )

    log_format: Literal["text", "json"] = Field("text", description="Form of each line of the log.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="From which severity on our own processes log. debug: a line about each request everywhere."
    )
    access_log: Literal["auto", "on", "off"] = Field(
        "auto", description="A line for each request that has ended. auto: under load a summary every ten seconds."
    )
    slow_request_s: float = Field(
        30.0, ge=0, description="How long a request may stand still before the log names it. 0: for ever."
    )

    router_threads: int | None = Field(
        None, ge=1, description="CPU threads of each router. Default: the machine's cores shared out evenly."
    )
    shard_threads: int | None = Field(
        None, ge=1, description="CPU threads of each shard. Default: the machine's cores shared out evenly."
    )
    gateway_num_cpus: float = Field(0.1, ge=0, description="CPUs that Ray sets aside for each gateway.")
    router_num_cpus: float = Field(0.1, ge=0, description="CPUs that Ray sets aside for each router.")
    shard_num_cpus: float = Field(0.1, gt=0, description="CPUs that Ray sets aside for each shard.")

    @property
    def log_settings(self) -> LogSettings:
        return LogSettings(format=self.log_format, level=self.log_level)

    @property
    def most_routers(self) -> int:
        return self.max_routers or self.routers

    @property
    def most_shards(self) -> int:
        return self.max_shards or self.shards

    @property
    def prefix_gap(self) -> int:
        return self.max_num_seqs // PREFIX_PART if self.router_prefix_gap is None else self.router_prefix_gap

    @field_validator("app_name")
    @classmethod
    def _check_app_name(cls, value: str) -> str:
        if not APP_NAME.fullmatch(value):
            raise ValueError("must be 1 to 63 letters, digits, '_', '.' or '-', the first a letter or digit")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.copies > max(1, self.shards):
            raise ValueError(f"copies must be at most shards ({self.shards}), not {self.copies}")
        if self.most_shards < self.shards:
            raise ValueError(f"max_shards must be at least shards ({self.shards}), not {self.max_shards}")
        if self.shards == 0 < self.most_shards:
            raise ValueError("shards must be at least 1 where max_shards is given, not 0")
        if self.most_routers < self.routers:
            raise ValueError(f"max_routers must be at least routers ({self.routers}), not {self.max_routers}")
        if self.http_port == self.grpc_port:
            raise ValueError(f"grpc_port must differ from http_port, both are {self.grpc_port}")
        return self


def parse_config(values: Mapping[str, Any]) -> ServiceConfig:
    """Raises ConfigError naming every key that is unknown or wrong."""
    try:
        return ServiceConfig(**values)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(detail) for detail in error.errors())) from None


def _sentence(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    match detail["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key"
        case "value_error":
            reason = str(detail["ctx"]["error"])
            return f"{key}: {reason}" if key else reason
        case _:
            return f"{key}: {detail['msg']}, not {detail['input']!r}"


def read_config_file(path: Path) -> dict[str, Any]:
    """The keys of a YAML file, not yet checked: flags may still be added. Raises ConfigError, OSError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must be a mapping of keys to values")
    return values
