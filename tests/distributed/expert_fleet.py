"""Shards with random experts, as threads of the test or as processes of their own, and the oracle beside them.

An expert's weights are a function of its slot alone, so every process builds the same ones.
Run as a script this file is one shard: the first line of stdin is its description, every later line an epoch; it
answers each line and ends with its stdin.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import torch
from lane_transports import CONNECTORS
from shard_faults import arm

from experts.dispatch import LocalDispatcher
from experts.epoch import Epoch, ShardAddress
from experts.lane import LaneDispatcher
from experts.linear import PackedLinear, pack_linear
from experts.mlp import Mlp
from experts.placement import ExpertPlacement, ShardId, Slot, place
from experts.server import ServerLimits, ShardServer
from experts.shard import Shard
from experts.transport.waiting import WaitPolicy, wait_policy

SECRET = b"a secret of the tests"
# Wide enough that 60k rows are more than a socket's two buffers hold.
HIDDEN = 128
WIDTH = 48
LAYERS = (1, 3)


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.002)


def random_mlp(slot: Slot, dtype: torch.dtype) -> Mlp:
    generator = torch.Generator().manual_seed(1 + slot.layer * 1000 + slot.expert)

    def linear(out_features: int, in_features: int) -> PackedLinear:
        weight_OI = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
        return pack_linear(weight_OI.to(dtype))

    return Mlp(gate=linear(WIDTH, HIDDEN), up=linear(WIDTH, HIDDEN), down=linear(HIDDEN, WIDTH))


def make_shard(shard_id: str, slots: Iterable[Slot], dtype: torch.dtype = torch.float32) -> Shard:
    mlps = {slot: random_mlp(slot, dtype) for slot in slots}
    return Shard(shard_id=ShardId(shard_id), slots=mlps, hidden_size=HIDDEN, dtype=dtype)


def oracle(num_experts: int, dtype: torch.dtype = torch.float32) -> LocalDispatcher:
    return LocalDispatcher(
        make_shard("oracle", [Slot(layer, expert) for layer in LAYERS for expert in range(num_experts)], dtype)
    )


class ThreadShard:
    def __init__(self, shard_id: ShardId, slots: Sequence[Slot], dtype: torch.dtype, limits: ServerLimits) -> None:
        self.shard = make_shard(shard_id, slots, dtype)
        self.server = ShardServer(self.shard, secret=SECRET, limits=limits)
        self.address = self.server.address("here")
        self.server.start()

    def serve_epoch(self, epoch: Epoch) -> None:
        self.shard.serve_epoch(epoch)

    def kill(self) -> None:
        self.server.stop()
        assert self.server.wait_closed(10)

    close = kill


class ProcessShard:
    def __init__(
        self,
        shard_id: ShardId,
        slots: Sequence[Slot],
        dtype: torch.dtype,
        _limits: ServerLimits,
        fault: tuple[str, int] | None = None,
        spin_us: int | None = None,
    ) -> None:
        """fault: see shard_faults.arm."""
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        description = {
            "shard_id": shard_id,
            "slots": slots,
            "dtype": str(dtype).removeprefix("torch."),
            "fault": fault,
            "spin_us": spin_us,
        }
        self.address = ShardAddress(**json.loads(self._ask(description)))

    def serve_epoch(self, epoch: Epoch) -> None:
        assert self._ask(epoch.to_dict()) == str(epoch.number)

    def stop(self) -> None:
        """SIGSTOP, and only returns when the kernel has stopped it."""
        self.process.send_signal(signal.SIGSTOP)
        self.wait_stopped()

    def wait_stopped(self) -> None:
        """Until somebody has stopped it."""
        _pid, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), status

    def wake_up(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        self.kill()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()

    def _ask(self, line: Any) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


class Fleet:
    """The shards of one epoch and the dispatchers made for it; closes them all at the end."""

    def __init__(
        self,
        *,
        num_shards: int,
        num_experts: int = 8,
        copies: int = 1,
        dtype: torch.dtype = torch.float32,
        hosting: type[ThreadShard | ProcessShard] = ThreadShard,
        placement: ExpertPlacement | None = None,
        limits: ServerLimits | None = None,
        transport: str = "auto",
        how: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """transport: of all its dispatchers, a name of lane_transports.CONNECTORS. how: more about single shards, by
        their id."""
        self.dtype = dtype
        self.transport = transport
        ids = [ShardId(f"shard-{index}") for index in range(num_shards)]
        placement = placement or place(moe_layers=LAYERS, num_experts=num_experts, shard_ids=ids, copies=copies)
        limits = limits or ServerLimits()
        self.shards = {
            shard_id: hosting(
                shard_id, placement.slots_by_shard[shard_id], dtype, limits, **(how or {}).get(shard_id, {})
            )
            for shard_id in ids
        }
        addresses = tuple(shard.address for shard in self.shards.values())
        self.epoch = Epoch(number=7, weights_version=0, shards=addresses, placement=placement)
        for shard in self.shards.values():
            shard.serve_epoch(self.epoch)
        self.oracle = oracle(num_experts, dtype)
        self._dispatchers: list[LaneDispatcher] = []

    def dispatcher(
        self,
        lane_id: str = "lane",
        *,
        epoch: Epoch | None = None,
        secret: bytes = SECRET,
        timeout_s: float = 20.0,
        silence_s: float = 1.0,
        wait: WaitPolicy | None = None,
    ) -> LaneDispatcher:
        made = LaneDispatcher(
            lane_id=lane_id,
            epoch=epoch or self.epoch,
            secret=secret,
            timeout_s=timeout_s,
            silence_s=silence_s,
            connect=CONNECTORS[self.transport],
            wait=wait,
        )
        made.begin_step(0)
        self._dispatchers.append(made)
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for dispatcher in self._dispatchers:
            dispatcher.close()
        for shard in self.shards.values():
            shard.close()


def _be_a_shard() -> None:
    torch.set_num_threads(1)
    description = json.loads(sys.stdin.readline())
    slots = [Slot(*slot) for slot in description["slots"]]
    shard = make_shard(description["shard_id"], slots, getattr(torch, description["dtype"]))
    if description["fault"] is not None:
        arm(*description["fault"])
    server = ShardServer(shard, secret=SECRET, wait=wait_policy(description["spin_us"]))
    server.start()
    print(json.dumps(asdict(server.address("here"))), flush=True)
    for line in sys.stdin:
        epoch = Epoch.from_dict(json.loads(line))
        shard.serve_epoch(epoch)
        print(epoch.number, flush=True)


if __name__ == "__main__":
    _be_a_shard()
