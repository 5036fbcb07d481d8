"""Drives the model the way an engine would, with block tables scattered at will."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tiny_models import TinyModel

from experts.dispatch import Dispatcher, LocalDispatcher
from experts.placement import ShardId
from experts.shard import Shard
from router.batch import InputEmbeddings, SequenceSlice, build_batch
from router.kv_cache import KvCache, KvCacheSpec
from router.model import ForwardResult, Llama4Model

NUM_BLOCKS = 200


@dataclass(slots=True)
class RunningSequence:
    token_ids: list[int]
    num_computed_tokens: int = 0
    global_blocks: list[int] = field(default_factory=list)
    local_blocks: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


class PagedRunner:
    """One model, one KV cache. ``block_seed`` shuffles which physical blocks sequences get."""

    def __init__(
        self, model: Llama4Model, dispatcher: Dispatcher, *, block_size: int | None = None, block_seed: int = 0
    ) -> None:
        self.model = model
        self.dispatcher = dispatcher
        self.block_size = model.config.block_size_for(block_size)
        spec = KvCacheSpec(config=model.config, dtype=model.weights.embedding_VD.dtype, block_size=self.block_size)
        self.kv = KvCache(spec, num_global_blocks=NUM_BLOCKS, num_local_blocks=NUM_BLOCKS, device=torch.device("cpu"))
        shuffle = random.Random(block_seed).sample
        self.free_global = shuffle(range(1, NUM_BLOCKS), NUM_BLOCKS - 1)
        self.free_local = shuffle(range(1, NUM_BLOCKS), NUM_BLOCKS - 1)

    def step(
        self,
        work: Sequence[tuple[RunningSequence, int]],
        embeddings: InputEmbeddings | None = None,
    ) -> ForwardResult:
        """Computes so many more tokens of each sequence, wanting logits of all of them."""
        slices = [self._slice(sequence, count, embeddings) for sequence, count in work]
        batch = build_batch(slices, self.model.config, self.block_size, self.model.device)
        result = self.model.forward(batch, self.kv, self.dispatcher)
        for (sequence, count), logits in zip(work, result.logits_LV.split([count for _, count in work]), strict=True):
            sequence.logits.append(logits)
            sequence.num_computed_tokens += count
            self._free_old_chunks(sequence)
        return result

    def run(self, token_ids: list[int], counts: Sequence[int] | None = None) -> torch.Tensor:
        """[T, V] of one sequence alone, prefilled in pieces of the given sizes (default: whole)."""
        sequence = RunningSequence(token_ids)
        for count in counts or [len(token_ids)]:
            self.step([(sequence, count)])
        return torch.cat(sequence.logits)

    def _slice(self, sequence: RunningSequence, count: int, embeddings: InputEmbeddings | None) -> SequenceSlice:
        start = sequence.num_computed_tokens
        needed = -(-(start + count) // self.block_size)
        while len(sequence.global_blocks) < needed:
            sequence.global_blocks.append(self.free_global.pop())
            sequence.local_blocks.append(self.free_local.pop())
        return SequenceSlice(
            token_ids=sequence.token_ids[start : start + count],
            start=start,
            global_blocks=sequence.global_blocks,
            local_blocks=sequence.local_blocks,
            logits_from=0,
            embeddings=embeddings,
        )

    def _free_old_chunks(self, sequence: RunningSequence) -> None:
        """Local blocks of finished chunks go back at once, so that reading one would show."""
        chunk = self.model.config.attention_chunk_size
        if chunk is None:
            return
        for index in range(sequence.num_computed_tokens // chunk * chunk // self.block_size):
            if sequence.local_blocks[index] != 0:
                self.free_local.insert(0, sequence.local_blocks[index])
                sequence.local_blocks[index] = 0


def make_runner(
    tiny: TinyModel,
    *,
    dtype: torch.dtype = torch.float32,
    block_size: int | None = None,
    block_seed: int = 0,
) -> PagedRunner:
    shard = Shard(
        shard_id=ShardId("local"),
        slots=tiny.experts(dtype),
        hidden_size=tiny.config.hidden_size,
        dtype=dtype,
    )
    return PagedRunner(tiny.load(dtype), LocalDispatcher(shard), block_size=block_size, block_seed=block_seed)
