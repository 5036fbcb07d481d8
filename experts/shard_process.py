"""One shard as a plain process, without Ray, for benchmarks and for looking at a shard by itself.

``python -m experts.shard_process`` reads lines of JSON: first what the shard is, a ShardProcessSpec, then epochs to
serve. It answers the first with its ShardAddress, each epoch with its number, what it cannot do with {"error": ..},
and ends with its stdin.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from experts.epoch import Epoch
from experts.expert_shape import ExpertShape
from experts.logs import LogSettings
from experts.placement import ShardId, Slot
from experts.server import ShardServer
from experts.shard import Shard
from experts.shard_loader import load_shard
from experts.shard_spec import ShardSpec
from experts.stand_in import EchoExpert


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardProcessSpec:
    """echo_s: the experts are EchoExperts of that service time, and of echo_row_s for each row, and no checkpoint is
    read; None: real ones."""

    shard: ShardSpec
    echo_s: float | None = None
    echo_row_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"shard": asdict(self.shard) | {"secret": self.shard.secret.hex()}}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        """The inverse of to_dict, also after a journey through JSON."""
        given = plain["shard"]
        shard = ShardSpec(
            **given
            | {
                "shard_id": ShardId(given["shard_id"]),
                "shape": ExpertShape(**given["shape"]),
                "slots": tuple(Slot(*slot) for slot in given["slots"]),
                "secret": bytes.fromhex(given["secret"]),
                "log": LogSettings(**given["log"]),
            }
        )
        return cls(shard=shard, echo_s=plain["echo_s"], echo_row_s=plain["echo_row_s"])


def make_shard(spec: ShardProcessSpec) -> Shard:
    """Raises as ``load_shard`` does."""
    if spec.echo_s is None:
        return load_shard(spec.shard)
    return Shard(
        shard_id=spec.shard.shard_id,
        slots={slot: EchoExpert(spec.echo_s, spec.echo_row_s) for slot in spec.shard.slots},
        hidden_size=spec.shard.shape.hidden_size,
        dtype=getattr(torch, spec.shard.dtype),
        weights_version=spec.shard.weights_version,
    )


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    try:
        spec = ShardProcessSpec.from_dict(json.loads(sys.stdin.readline()))
        shard = make_shard(spec)
        server = ShardServer(shard, secret=spec.shard.secret, num_threads=spec.shard.num_threads)
    except (ValueError, OSError) as error:
        _answer({"error": f"{type(error).__name__}: {error}"})
        return
    server.start()
    _answer(asdict(server.address("this host")))
    for line in sys.stdin:
        epoch = Epoch.from_dict(json.loads(line))
        shard.serve_epoch(epoch)
        _answer({"epoch": epoch.number})


def _answer(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
