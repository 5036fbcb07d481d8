"""The contestants of `bench engine`: each one or more processes of its own, all asked the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import cluster
from cluster.bench.child import Child
from cluster.bench.peers.line_protocol import Setup
from cluster.bench.rows import Row
from cluster.bench.shard_children import ShardChildren, ShardTierSpec
from experts.expert_dtype import ExpertDtype, ExpertDtypeChoice
from experts.transport.names import LaneTransport
from router.messages import MicroBatchMode

LOAD_TIMEOUT_S = 900.0
ANSWER_TIMEOUT_S = 300.0

MODULES = {"transformers": "transformers_peer", "llama.cpp": "llama_cpp_peer", "vllm": "vllm_peer"}


@dataclass(slots=True, kw_only=True)
class Timing:
    """Seconds of each step, and of the CPU in the contestant's first process, all its threads together."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def add(self, other: Timing) -> None:
        self.seconds += other.seconds
        self.cpu_seconds += other.cpu_seconds


class Sleeper(Protocol):
    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Contestant:
    """Processes that all do the same at the same time: one, or the routers of a tier of shards.

    Outside of ``awake`` none of them runs. columns are what its rows say of it.
    """

    def __init__(self, children: Sequence[Child], sleepers: Sequence[Sleeper], columns: Row, *, version: str) -> None:
        self.columns = columns
        self.version = version
        self._children = children
        self._sleepers = [*children, *sleepers]

    @property
    def name(self) -> str:
        return str(self.columns["contestant"])

    @property
    def num_processes(self) -> int:
        return len(self._children)

    @contextmanager
    def awake(self) -> Iterator[None]:
        for sleeper in reversed(self._sleepers):
            sleeper.resume()
        try:
            yield
        finally:
            self.pause()

    def pause(self) -> None:
        for sleeper in self._sleepers:
            sleeper.pause()

    def ask(self, question: Mapping[str, Any], timeout_s: float = ANSWER_TIMEOUT_S) -> Timing:
        """The answers of all its processes. Raises ChildError."""
        for child in self._children:
            child.tell(question)
        timing = Timing()
        for child in self._children:
            answer = child.hear(timeout_s)
            timing.add(Timing(seconds=answer["seconds"], cpu_seconds=answer["cpu_seconds"]))
        return timing


def start_peer(name: str, setup: Setup, python: str, closing: ExitStack) -> Contestant:
    """Runs the peer with an interpreter that has its library. Raises ChildError, OSError."""
    # The peers' code and nothing else of ours: our site-packages must not mix with the other environment's.
    root = closing.enter_context(TemporaryDirectory(prefix="arriero-bench-"))
    (Path(root) / "cluster").symlink_to(_package_folder(), target_is_directory=True)
    # -P: not what lies in the current folder.
    command = [python, "-P", "-m", f"cluster.bench.peers.{MODULES[name]}"]
    columns: Row = {"contestant": name, "shards": 0}
    return _start([Child(name, command, environment={"PYTHONPATH": root})], [], [setup], columns, closing)


def start_arriero(
    name: str,
    setup: Setup,
    closing: ExitStack,
    *,
    root: Path | None = None,
    num_routers: int = 1,
    tier: ShardTierSpec | None = None,
    transport: LaneTransport = "shm",
    micro_batches: MicroBatchMode = "auto",
    expert_dtype: ExpertDtypeChoice = "auto",
) -> Contestant:
    """root: another checkout of arriero to run instead of this one. transport: to the shards of tier.

    Raises ChildError, OSError.
    """
    environment = {} if root is None else {"PYTHONPATH": str(root)}
    if tier is not None:
        tier = replace(tier, quantized=ExpertDtype.chosen(setup.dtype, expert_dtype).stored)
    shards = None if tier is None else closing.enter_context(ShardChildren(tier))
    command = [sys.executable, "-P", "-m", "cluster.bench.peers.arriero_peer"]
    children = [Child(name, command, environment=environment) for _ in range(num_routers)]
    options: dict[str, Any] = {} if shards is None else {"epoch": shards.epoch.to_dict(), "secret": shards.secret.hex()}
    options |= {"lane_transport": transport, "micro_batches": micro_batches, "expert_dtype": expert_dtype}
    setups = [replace(setup, options=options | {"router_id": f"router-{index}"}) for index in range(num_routers)]
    columns: Row = {"contestant": name, "expert_dtype": expert_dtype, "shards": 0, "transport": "local"}
    if tier is not None:
        columns |= {"shards": tier.num_shards, "transport": transport, "routers": num_routers}
        columns["micro_batches"] = micro_batches
        if tier.echo_s is not None:
            columns |= {"simulated_ms": tier.echo_s * 1e3, "simulated_row_us": tier.echo_row_s * 1e6}
    return _start(children, [] if shards is None else [shards], setups, columns, closing)


def _start(
    children: list[Child], sleepers: list[Sleeper], setups: list[Setup], columns: Row, closing: ExitStack
) -> Contestant:
    for child in children:
        closing.callback(child.close)
    for child, setup in zip(children, setups, strict=True):
        child.tell(asdict(setup))
    versions = [child.hear(LOAD_TIMEOUT_S)["version"] for child in children]
    return Contestant(children, sleepers, columns, version=versions[0])


def _package_folder() -> Path:
    assert cluster.__file__ is not None
    return Path(cluster.__file__).parent
