"""A model that notices wrong block tables: its KV stores hold token ids, and each next token depends on everything
that is read back through the tables of both groups. An engine around it, and what it must produce.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from experts.placement import ShardId
from router.batch import SequenceSlice
from router.config import ModelConfig
from router.engine import Engine, EngineLimits
from router.messages import FinishReason, GenerateRequest, MissingExpertPolicy, SequenceOutput
from router.model import ForwardResult
from router.sampling_params import SamplingParams

VOCAB_SIZE = 40
EOS = 2
EXPERT_WAIT_S = 120.0
DEGRADED = 1000
"""Added to a stored token id whose keys and values were computed without an expert, now or before it."""


def fake_config(*, attention_chunk_size: int | None = 8) -> ModelConfig:
    raw = {
        "model_type": "llama4_text",
        "vocab_size": VOCAB_SIZE,
        "num_hidden_layers": 4,
        "attention_chunk_size": attention_chunk_size,
        "eos_token_id": EOS,
    }
    return ModelConfig.from_checkpoint_config(raw)


class FakeDispatcher:
    def __init__(self) -> None:
        self.lost: dict[ShardId, str] = {}
        self.step = 0

    def begin_step(self, step: int) -> None:
        assert step > self.step
        self.step = step


class FakeModel:
    """Tokens in lost_token_ids belong to an expert that cannot be reached. Sequences that see a token of
    broken_token_ids get logits that are not finite."""

    def __init__(self, config: ModelConfig, limits: EngineLimits) -> None:
        self.device = torch.device("cpu")
        self.chunk_size = config.attention_chunk_size
        self.block_size = limits.block_size
        self.global_store: dict[tuple[int, int], int] = {}
        self.local_store: dict[tuple[int, int], int] = {}
        self.lost_token_ids: set[int] = set()
        self.broken_token_ids: set[int] = set()
        self.computed: list[int] = []

    def forward(self, slices: Sequence[SequenceSlice], kv: Any, dispatcher: Any) -> ForwardResult:
        rows = [row for part in slices for row in self._part(part)]
        missing = [token_id in self.lost_token_ids for part in slices for token_id in part.token_ids]
        logits_LV = torch.stack(rows) if rows else torch.empty(0, VOCAB_SIZE)
        self.computed.append(sum(len(part.token_ids) for part in slices))
        return ForwardResult(logits_LV, torch.tensor(missing) if any(missing) else None)

    def _part(self, part: SequenceSlice) -> Iterator[torch.Tensor]:
        for offset, token_id in enumerate(part.token_ids):
            position = part.start + offset
            before = self._read(self.global_store, part.global_blocks, 0, position)
            is_degraded = token_id in self.lost_token_ids or any(value >= DEGRADED for value in before)
            value = token_id + DEGRADED * is_degraded
            self.global_store[self._slot(part.global_blocks, position)] = value
            self.local_store[self._slot(part.local_blocks, position)] = value
            if offset >= part.logits_from:
                chunk_start = 0 if self.chunk_size is None else position // self.chunk_size * self.chunk_size
                seen_global = self._read(self.global_store, part.global_blocks, 0, position + 1)
                seen_local = self._read(self.local_store, part.local_blocks, chunk_start, position + 1)
                is_broken = not self.broken_token_ids.isdisjoint(seen_global)
                yield fake_logits(seen_global, seen_local) * (float("nan") if is_broken else 1.0)

    def _read(self, store: dict[tuple[int, int], int], table: Sequence[int], start: int, stop: int) -> list[int]:
        return [store[self._slot(table, position)] for position in range(start, stop)]

    def _slot(self, table: Sequence[int], position: int) -> tuple[int, int]:
        block_id = table[position // self.block_size]
        assert block_id != 0, f"position {position} is in the null block"
        return block_id, position % self.block_size


def fake_logits(seen_global: Sequence[int], seen_local: Sequence[int]) -> torch.Tensor:
    """[V]. Any other token anywhere gives other logits."""
    digest = hashlib.sha256(repr((list(seen_global), list(seen_local))).encode()).digest()
    values = random.Random(digest).choices(range(-400, 400), k=VOCAB_SIZE)
    return torch.tensor(values, dtype=torch.float32) / 100


def true_logits(token_ids: Sequence[int], config: ModelConfig) -> torch.Tensor:
    """[V] after these tokens, with every expert there."""
    chunk_size = config.attention_chunk_size
    chunk_start = 0 if chunk_size is None else (len(token_ids) - 1) // chunk_size * chunk_size
    return fake_logits(token_ids, token_ids[chunk_start:])


def true_greedy(prompt_ids: Sequence[int], num_tokens: int, config: ModelConfig) -> list[int]:
    """The greedy continuation, with no regard to end tokens."""
    token_ids = list(prompt_ids)
    for _ in range(num_tokens):
        token_ids.append(int(true_logits(token_ids, config).argmax()))
    return token_ids[len(prompt_ids) :]


class Harness:
    """An engine around the fake model that checks its integrity after every step."""

    def __init__(
        self,
        *,
        config: ModelConfig | None = None,
        num_free_blocks: dict[str, int] | None = None,
        on_missing_expert: MissingExpertPolicy = MissingExpertPolicy.FAIL,
        **limits: int,
    ) -> None:
        blocks = num_free_blocks or {"global": 64, "local": 64}
        sizes = {"max_model_len": 128, "max_num_batched_tokens": 16, "max_num_seqs": 8, "block_size": 4} | limits
        self.config = config or fake_config()
        self.limits = EngineLimits(
            num_global_blocks=blocks["global"] + 1, num_local_blocks=blocks["local"] + 1, **sizes
        )
        self.model = FakeModel(self.config, self.limits)
        self.dispatcher = FakeDispatcher()
        self.engine = Engine(
            model=self.model,  # type: ignore[arg-type]
            kv_cache=None,  # type: ignore[arg-type]
            dispatcher=self.dispatcher,  # type: ignore[arg-type]
            config=self.config,
            limits=self.limits,
            on_missing_expert=on_missing_expert,
            expert_wait_s=EXPERT_WAIT_S,
            clock=lambda: self.now_s,
        )
        self.now_s = 0.0
        self.token_ids: dict[str, list[int]] = {}
        self.outputs: dict[str, list[SequenceOutput]] = {}

    def add(self, request_id: str, prompt_ids: list[int], *, resume_ids: Sequence[int] = (), **fields: Any) -> None:
        """Fields of SamplingParams and of GenerateRequest; greedy and past end tokens unless they say otherwise."""
        names = GenerateRequest.__struct_fields__
        own = {name: fields.pop(name) for name in tuple(fields) if name in names}
        params = SamplingParams(**({"temperature": 0.0, "ignore_eos": True} | fields))
        request = GenerateRequest(
            request_id=request_id, prompt_ids=prompt_ids, params=params, resume_ids=list(resume_ids), **own
        )
        self.engine.add(request)
        self.token_ids[request_id] = []
        self.outputs[request_id] = []

    def step(self) -> list[SequenceOutput]:
        with slices_as_batch():
            outputs = self.engine.step()
        self.engine.check_integrity()
        for output in outputs:
            assert self.end(output.request_id) is None, "output after the end"
            self.token_ids[output.request_id] += output.token_ids
            self.outputs[output.request_id].append(output)
        return outputs

    def run(self, max_steps: int = 10_000) -> dict[str, list[int]]:
        """Steps to the end; the output tokens of each request."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                return self.token_ids
            self.step()
        raise AssertionError(f"not done after {max_steps} steps")

    def generate(self, prompt_ids: list[int], **fields: Any) -> list[SequenceOutput]:
        """Adds one request and runs to the end."""
        request_id = f"request-{len(self.outputs)}"
        self.add(request_id, prompt_ids, **fields)
        self.run()
        return self.outputs[request_id]

    def end(self, request_id: str) -> FinishReason | None:
        """Why the request has ended; None while it has not."""
        outputs = self.outputs[request_id]
        return outputs[-1].finish_reason if outputs else None

    def assert_all_blocks_free(self) -> None:
        stats = self.engine.stats()
        assert stats.num_free_blocks == stats.num_blocks


@contextmanager
def slices_as_batch() -> Iterator[None]:
    """Lets the model see the slices as they leave the engine."""
    with patch("router.engine.build_batch", lambda slices, *_: slices):
        yield


def tokens(length: int, *, seed: int = 0) -> list[int]:
    """Plain tokens: no end token among them."""
    return random.Random(seed).choices(range(EOS + 1, VOCAB_SIZE), k=length)
