"""The engine: requests in, tokens out, one step at a time. Nothing here waits, and nothing knows of processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as ListOf
from typing import Protocol

import torch

from experts.dispatch import Dispatcher
from experts.load import ExpertLoad
from router.batch import Batch, SequenceSlice, build_batch
from router.block_geometry import BlockGeometry
from router.block_manager import BlockManager
from router.config import ModelConfig
from router.engine_limits import EngineLimits
from router.finish import finish_reason, finish_reason_of_resumed
from router.kv_cache import KvCache
from router.maxima import row_maxima
from router.messages import (
    EngineStats,
    ErrorCode,
    FinishReason,
    GenerateRequest,
    MissingExpertPolicy,
    SequenceOutput,
)
from router.micro_batches import MicroBatching, halve
from router.model import ForwardResult
from router.parking import Parking
from router.prefix_cache.block_hash import root_hash
from router.request_check import check_request
from router.sampler import Sampled
from router.sampling_state import SamplingState
from router.scheduler import Scheduler
from router.sequence import Sequence, SequenceStatus
from router.sequence_output import StepFailure, sequence_output
from router.step_failures import find_failures, parts_that_wait, who_is_lost
from router.step_part import StepPart, lay_out
from router.step_sampling import collect_prompt_logprobs, sample_parts

__all__ = ["Engine", "EngineLimits"]


class Model(Protocol):
    """What a step needs of router.model.Llama4Model."""

    device: torch.device

    def forward(self, batch: Batch, kv: KvCache, dispatcher: Dispatcher) -> ForwardResult: ...

    def forward_in_turn(self, batches: ListOf[Batch], kv: KvCache, dispatcher: Dispatcher) -> ForwardResult: ...


class Engine:
    """Continuous batching over one model and one KV cache.

    Not thread-safe: one thread calls add, abort and step. An exception out of step() is fatal: the sequences and
    the cache are then no longer in agreement.
    """

    def __init__(
        self,
        *,
        model: Model,
        kv_cache: KvCache,
        dispatcher: Dispatcher,
        config: ModelConfig,
        limits: EngineLimits,
        on_missing_expert: MissingExpertPolicy = MissingExpertPolicy.WAIT,
        expert_wait_s: float = 120.0,
        weights_version: int = 0,
        expert_load: ExpertLoad | None = None,
        micro_batching: MicroBatching | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """on_missing_expert is for requests that do not say; those that wait do so for expert_wait_s at most.
        weights_version keys the prefix cache. expert_load is of experts in this process. micro_batching:
        None decides by itself.

        Raises ValueError when the block size does not divide the attention chunk."""
        self._model = model
        self._kv_cache = kv_cache
        self._dispatcher = dispatcher
        self._config = config
        self._limits = limits
        self._on_missing_expert = on_missing_expert
        self._expert_wait_s = expert_wait_s
        self._parking = Parking(max_wait_s=expert_wait_s, clock=clock)
        self._weights_version = weights_version
        self._expert_load = expert_load
        self._micro_batching = micro_batching or MicroBatching()
        self._block_manager = BlockManager(
            geometry=BlockGeometry(block_size=limits.block_size, attention_chunk_size=config.attention_chunk_size),
            num_global_blocks=limits.num_global_blocks,
            num_local_blocks=limits.num_local_blocks,
        )
        self._scheduler = Scheduler(
            self._block_manager,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_num_seqs=limits.max_num_seqs,
            max_prompt_logprob_rows=limits.max_prompt_logprob_rows,
        )
        self._sequences: dict[str, Sequence] = {}
        self._ended_at_add: dict[str, SequenceOutput] = {}
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_degraded_tokens = 0

    # Requests

    def add(self, request: GenerateRequest) -> None:
        """Queues a request. Raises ValueError, naming field and value, for one that cannot be served."""
        check_request(
            request,
            vocab_size=self._config.vocab_size,
            eos_token_ids=self._config.eos_token_ids,
            limits=self._limits,
        )
        if request.request_id in self._sequences or request.request_id in self._ended_at_add:
            raise ValueError(f"request_id {request.request_id!r} is open already")
        sequence = self._new_sequence(request)
        reason = finish_reason_of_resumed(sequence)
        if reason is not None:
            self._ended_at_add[request.request_id] = sequence_output(sequence, finish_reason=reason)
            return
        # The last token that is sampled is never computed.
        if not self._block_manager.can_ever_fit(sequence.max_total_tokens - 1):
            raise ValueError(
                f"max_tokens {request.params.max_tokens} after {sequence.num_prompt_tokens} prompt tokens does not "
                f"fit the KV cache, even alone"
            )
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)
        self._num_prompt_tokens += sequence.num_prompt_tokens

    def abort(self, request_id: str) -> None:
        """Drops a request and frees its blocks at once; it gets no further output. An unknown one is no error: it
        may just have ended."""
        self._ended_at_add.pop(request_id, None)
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence)

    def resume_parked(self) -> None:
        """Another epoch has been adopted: what sequences wait for may be there."""
        self._parking.resume_all()

    def _new_sequence(self, request: GenerateRequest) -> Sequence:
        params = request.params
        # Prompt log probabilities go out with the first output, so whoever resumes has them.
        wants_prompt_logprobs = params.num_prompt_logprobs is not None and not request.resume_ids
        return Sequence(
            request=request,
            missing_expert_policy=request.on_missing_expert or self._on_missing_expert,
            root_hash=root_hash(weights_version=self._weights_version, cache_salt=request.cache_salt),
            max_total_tokens=min(len(request.prompt_ids) + params.max_tokens, self._limits.max_model_len),
            sampling=SamplingState(
                params,
                prompt_ids=request.prompt_ids,
                output_ids=request.resume_ids,
                eos_token_ids=self._config.eos_token_ids,
                vocab_size=self._config.vocab_size,
                device=self._model.device,
            ),
            token_ids=request.prompt_ids + request.resume_ids,
            prompt_logprobs=[None] if wants_prompt_logprobs else None,
        )

    # The step

    @property
    def has_work(self) -> bool:
        """Whether step() would do or return anything: not while all that there is waits for experts."""
        return bool(self._ended_at_add) or self._has_runnable or self._parking.has_overdue

    @property
    def _has_runnable(self) -> bool:
        return len(self._sequences) > self._parking.num_parked

    @torch.inference_mode()
    def step(self) -> list[SequenceOutput]:
        """Schedule, forward, sample, update. Returns what is new, at most one output per request."""
        outputs = list(self._ended_at_add.values())
        self._ended_at_add.clear()
        outputs += self._give_up_waiting()
        parts = lay_out(self._scheduler.schedule())
        assert bool(parts) == self._has_runnable, "a step without progress"
        if parts:
            result = self._forward(parts)
            parts = self._park(parts, result.missing_T)
            maxima = row_maxima(result.logits_LV)
            failures = find_failures(parts, result.missing_T, maxima, self._dispatcher.lost)
            self._note_degraded(parts, failures, result.missing_T)
            sampled = sample_parts((part for part in parts if part.sequence not in failures), result.logits_LV, maxima)
            outputs += self._update(parts, failures, sampled, result.logits_LV)
        return outputs

    def _forward(self, parts: ListOf[StepPart]) -> ForwardResult:
        self._num_steps += 1
        self._dispatcher.begin_step(self._num_steps)
        slices = [part.model_slice() for part in parts]
        num_tokens = sum(part.scheduled.num_tokens for part in parts)
        began_at = time.perf_counter()
        halved = self._micro_batching.is_halved(num_tokens)
        if halved:
            batches = [self._batch(half) for half in halve(slices)]
            result = self._model.forward_in_turn(batches, self._kv_cache, self._dispatcher)
        else:
            result = self._model.forward(self._batch(slices), self._kv_cache, self._dispatcher)
        seconds = time.perf_counter() - began_at
        self._micro_batching.note(num_tokens, halved=halved, seconds=seconds, waited_s=result.waited_s)
        return result

    def _batch(self, slices: ListOf[SequenceSlice]) -> Batch:
        return build_batch(slices, self._config, self._limits.block_size, self._model.device)

    def _park(self, parts: ListOf[StepPart], missing_T: torch.Tensor | None) -> list[StepPart]:
        """Takes this step back from sequences that are to wait for an expert it missed; returns the other parts."""
        for part in parts_that_wait(parts, missing_T):
            self._block_manager.take_back(part.sequence)
            self._parking.park(part.sequence, who_is_lost(self._dispatcher.lost))
        return [part for part in parts if not part.sequence.parked]

    def _give_up_waiting(self) -> list[SequenceOutput]:
        failures = [
            (sequence, f"an expert could not be reached for {self._expert_wait_s:g} s: {reason}")
            for sequence, reason in self._parking.overdue()
        ]
        return [
            self._fail(sequence, StepFailure(code=ErrorCode.UNAVAILABLE, error=error)) for sequence, error in failures
        ]

    def _note_degraded(
        self, parts: ListOf[StepPart], failures: Mapping[Sequence, StepFailure], missing_T: torch.Tensor | None
    ) -> None:
        """Marks those that go on without an expert."""
        if missing_T is None:
            return
        for part in parts:
            num_missing = int(missing_T[part.token_rows].sum())
            if num_missing and part.sequence not in failures:
                part.sequence.degraded = True
                self._num_degraded_tokens += num_missing

    def _update(
        self,
        parts: ListOf[StepPart],
        failures: Mapping[Sequence, StepFailure],
        sampled: Mapping[Sequence, Sampled],
        logits_LV: torch.Tensor,
    ) -> list[SequenceOutput]:
        outputs: list[SequenceOutput] = []
        for part in parts:
            sequence = part.sequence
            if sequence in failures:
                outputs.append(self._fail(sequence, failures[sequence]))
                continue
            collect_prompt_logprobs(part, logits_LV)
            self._block_manager.advance(sequence, part.scheduled.num_tokens)
            self._parking.leave(sequence)
            if sequence in sampled:
                outputs.append(self._append(sequence, sampled[sequence]))
            elif sequence.request.return_address and not sequence.has_spoken:
                # Its gateway shall know that it has begun.
                outputs.append(sequence_output(sequence))
        return outputs

    def _append(self, sequence: Sequence, sampled: Sampled) -> SequenceOutput:
        """Gives the sequence its next token, ending it if that is its last."""
        sequence.token_ids.append(sampled.token_id)
        sequence.sampling.append(sampled.token_id)
        self._num_generated_tokens += 1
        reason = finish_reason(sequence)
        if reason is not None:
            self._end(sequence)
        return sequence_output(sequence, sampled=sampled, finish_reason=reason)

    def _fail(self, sequence: Sequence, failure: StepFailure) -> SequenceOutput:
        self._end(sequence)
        return sequence_output(sequence, finish_reason=FinishReason.ERROR, failure=failure)

    def _end(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        self._parking.leave(sequence)
        self._scheduler.remove(sequence)

    # What others look at

    def stats(self) -> EngineStats:
        """A snapshot between two steps."""
        pools = {"global": self._block_manager.global_pool, "local": self._block_manager.local_pool}
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_parked=self._parking.num_parked,
            num_waiting_tokens=sum(sequence.num_uncomputed_tokens for sequence in self._scheduler),
            num_free_blocks={name: pool.num_free for name, pool in pools.items()},
            num_blocks={name: pool.num_usable for name, pool in pools.items()},
            num_steps=self._num_steps,
            num_preemptions=self._scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_cached_tokens=self._scheduler.num_cached_tokens,
            num_degraded_tokens=self._num_degraded_tokens,
            lost_shards={str(shard_id): reason for shard_id, reason in self._dispatcher.lost.items()},
            expert_load=[] if self._expert_load is None else self._expert_load.snapshot(),
        )

    def check_integrity(self) -> None:
        """Asserts between two steps that sequences, queues, blocks and hashes agree. Slow: for tests."""
        sequences = list(self._scheduler)
        assert {sequence.request_id: sequence for sequence in sequences} == self._sequences, "a sequence is lost"
        assert len(sequences) == len(self._sequences), "a sequence is queued twice"
        assert sum(sequence.parked for sequence in sequences) == self._parking.num_parked, "parked ones are miscounted"
        for index, sequence in enumerate(sequences):
            is_running = index < self._scheduler.num_running
            assert sequence.status is (SequenceStatus.RUNNING if is_running else SequenceStatus.WAITING)
            assert is_running or not (sequence.global_blocks or sequence.local_blocks), "a waiting one holds blocks"
            assert sequence.num_computed_tokens < sequence.num_tokens <= sequence.max_total_tokens
            assert sequence.sampling.num_output_tokens == sequence.num_output_tokens
        self._block_manager.check_integrity(sequences)
