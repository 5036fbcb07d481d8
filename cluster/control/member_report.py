"""What a member tells the controller in each heartbeat, besides who it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.metrics.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenChoice:
    """A choice that a gateway works on, at the moment of the report. router_id is empty before one says that it has it.

    age_s: since the request came. idle_s: since anything was heard of the choice.
    """

    request_id: str
    choice_index: int
    router_id: str
    attempt: int
    phase: str
    age_s: float
    idle_s: float
    num_prompt_tokens: int
    num_completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberReport:
    """load: (layer, expert, tokens) since the member's start, of experts in its own process. open_choices: the
    oldest of a gateway's num_open_choices, oldest first. lanes: router.lane_state.LaneState.to_dict of a router whose
    experts are in shards, once its engine has told.

    Of a router, weights_version is its one version, replica names the Serve replica that it lives in, failed_versions
    are those that another router there could not start with, and why; resident_bytes is what its engine has taken of
    its host's memory, num_free_bytes what is left. Of a gateway, weights_versions are those that new requests and open
    ones are bound to."""

    load: list[tuple[int, int, int]] = field(default_factory=list)
    metrics: Snapshot = field(default_factory=Snapshot)
    open_choices: tuple[OpenChoice, ...] = ()
    num_open_choices: int = 0
    lanes: Mapping[str, Any] | None = None
    weights_version: int = 0
    replica: str = ""
    failed_versions: Mapping[int, str] = field(default_factory=dict)
    resident_bytes: int = 0
    num_free_bytes: int = 0
    weights_versions: frozenset[int] = frozenset()
