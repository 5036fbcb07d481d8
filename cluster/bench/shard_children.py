"""Expert shards as processes of a benchmark, without Ray: the tier of one epoch."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from cluster.bench.child import Child
from experts.epoch import Epoch, ShardAddress
from experts.expert_dtype import QuantizedDtype
from experts.expert_shape import ExpertShape
from experts.placement import ShardId, place
from experts.shard_process import ShardProcessSpec
from experts.shard_spec import ShardSpec

WEIGHTS_VERSION = 0
ANSWER_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTierSpec:
    """echo_s, echo_row_s: as in ShardProcessSpec; model is not read then. num_threads: of each shard."""

    num_shards: int
    model: str
    shape: ExpertShape
    moe_layers: Sequence[int]
    dtype: str
    num_threads: int
    echo_s: float | None
    echo_row_s: float = 0.0
    quantized: QuantizedDtype | None = None
    load_timeout_s: float = 600.0


class ShardChildren:
    """Starts the shards, opens the epoch on them; use it as a context. Raises ChildError."""

    def __init__(self, spec: ShardTierSpec) -> None:
        self.secret = secrets.token_bytes(32)
        self._closing = ExitStack()
        try:
            self._children, self.epoch = self._start(spec)
        except BaseException:
            self._closing.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def pause(self) -> None:
        for child in self._children:
            child.pause()

    def resume(self) -> None:
        for child in self._children:
            child.resume()

    def _start(self, spec: ShardTierSpec) -> tuple[list[Child], Epoch]:
        ids = [ShardId(f"shard-{index}") for index in range(spec.num_shards)]
        placement = place(moe_layers=spec.moe_layers, num_experts=spec.shape.num_experts, shard_ids=ids)
        children = [self._child(shard_id) for shard_id in ids]
        for child, shard_id in zip(children, ids, strict=True):
            shard = ShardSpec(
                shard_id=shard_id,
                model=spec.model,
                shape=spec.shape,
                slots=placement.slots_by_shard[shard_id],
                dtype=spec.dtype,
                quantized=spec.quantized,
                device="cpu",
                num_threads=spec.num_threads,
                secret=self.secret,
                weights_version=WEIGHTS_VERSION,
            )
            child.tell(ShardProcessSpec(shard=shard, echo_s=spec.echo_s, echo_row_s=spec.echo_row_s).to_dict())
        addresses = tuple(ShardAddress(**child.hear(spec.load_timeout_s)) for child in children)
        epoch = Epoch(number=1, weights_version=WEIGHTS_VERSION, shards=addresses, placement=placement)
        for child in children:
            child.tell(epoch.to_dict())
            child.hear(ANSWER_S)
        return children, epoch

    def _child(self, shard_id: ShardId) -> Child:
        child = Child(shard_id, [sys.executable, "-P", "-m", "experts.shard_process"], environment={})
        self._closing.callback(child.close)
        return child
