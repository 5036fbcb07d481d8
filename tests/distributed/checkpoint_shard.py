"""A shard of a real checkpoint as a process of its own, under the controller's calls but without Ray.

Run as a script it is that shard: the first line of stdin is its description, every later line a call; it answers
each line with one of JSON and ends with its stdin.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from experts.epoch import Epoch, ShardAddress
from experts.expert_shape import ExpertShape
from experts.placement import ShardId, Slot
from experts.shard_spec import ShardSpec

TERM = 1
HOST = "127.0.0.1"


class CheckpointShard:
    """Returns from its constructor once the shard has loaded its slots and listens."""

    def __init__(
        self, shard_id: ShardId, *, model: Path, shape: ExpertShape, slots: tuple[Slot, ...], secret: bytes
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        sizes = [shape.hidden_size, shape.intermediate_size, shape.num_experts]
        description = {
            "shard_id": shard_id,
            "model": str(model),
            "slots": slots,
            "sizes": sizes,
            "secret": secret.hex(),
        }
        port = self._ask(description)["port"]
        self.address = ShardAddress(shard_id=shard_id, node_id="here", host=HOST, port=port)

    def prepare(self, epoch: Epoch) -> None:
        """Raises RuntimeError with what the shard says."""
        self._call("prepare", epoch.to_dict())

    def retire(self, number: int) -> None:
        self._call("retire", number)

    def stats(self) -> dict[str, Any]:
        """epochs, slots, num_lanes, num_rows and num_refused_requests."""
        return self._call("stats", None)

    def stop(self) -> None:
        """SIGSTOP, and only returns when the kernel has stopped it."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def wake(self) -> None:
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

    def _call(self, method: str, argument: Any) -> dict[str, Any]:
        answer = self._ask([method, argument])
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _ask(self, line: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def _be_a_shard() -> None:
    from experts.server import ShardServer
    from experts.shard_control import ShardControl
    from experts.shard_loader import load_more, load_shard

    description = json.loads(sys.stdin.readline())
    hidden_size, intermediate_size, num_experts = description["sizes"]
    spec = ShardSpec(
        shard_id=ShardId(description["shard_id"]),
        model=description["model"],
        shape=ExpertShape(hidden_size=hidden_size, intermediate_size=intermediate_size, num_experts=num_experts),
        slots=tuple(Slot(*slot) for slot in description["slots"]),
        dtype="float32",
        device="cpu",
        num_threads=1,
        secret=bytes.fromhex(description["secret"]),
        weights_version=0,
    )
    shard = load_shard(spec)
    control = ShardControl(shard, partial(load_more, spec))
    server = ShardServer(shard, secret=spec.secret)
    server.start()
    _say({"port": server.port})

    def answer(method: str, argument: Any) -> dict[str, Any]:
        if method == "prepare":
            control.prepare(TERM, Epoch.from_dict(argument))
        elif method == "retire":
            control.retire(TERM, argument)
        return {
            "epochs": shard.epochs,
            "slots": shard.slots,
            "num_lanes": server.stats().num_lanes,
            "num_rows": sum(rows for _layer, _expert, rows in shard.load.snapshot()),
            "num_refused_requests": server.stats().num_refused_requests,
        }

    for line in sys.stdin:
        try:
            _say(answer(*json.loads(line)))
        except (ValueError, OSError, RuntimeError) as error:
            _say({"error": str(error)})


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _be_a_shard()
