"""Random workloads on tiny caches: every request ends, exactly once, with the tokens it would have had alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fake_model import Harness, fake_config, tokens, true_greedy
from hypothesis import given, settings
from hypothesis import strategies as st

from router.messages import FinishReason, MissingExpertPolicy

MAX_MODEL_LEN = 32
LOST_TOKEN_ID = 39


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One client's request and what happens to it. Prompts start with part of a text that all share."""

    num_shared: int
    num_own: int
    seed: int
    max_tokens: int
    arrives_at_step: int
    aborted_after_steps: int | None
    num_resumed: int
    wants_prompt_logprobs: bool
    may_degrade: bool

    @property
    def prompt_ids(self) -> list[int]:
        return [*tokens(20, seed=0)[: self.num_shared], *tokens(self.num_own, seed=self.seed)]


WORKLOADS = st.builds(
    Workload,
    num_shared=st.integers(0, 20),
    num_own=st.integers(1, 8),
    seed=st.integers(1, 3),
    max_tokens=st.integers(1, 12),
    arrives_at_step=st.integers(0, 12),
    aborted_after_steps=st.none() | st.integers(0, 10),
    num_resumed=st.integers(0, 3),
    wants_prompt_logprobs=st.booleans(),
    may_degrade=st.booleans(),
)


@st.composite
def harnesses(draw: st.DrawFn) -> Harness:
    """Caches that hold little more than one sequence, or less than a prompt's worth of local blocks."""
    block_size = draw(st.sampled_from([1, 2, 4]))
    chunk_size = draw(st.sampled_from([None, 4, 8, 16]))
    blocks = {
        "global": MAX_MODEL_LEN // block_size + draw(st.integers(0, 8)),
        "local": (chunk_size or MAX_MODEL_LEN) // block_size + draw(st.integers(0, 6)),
    }
    return Harness(
        config=fake_config(attention_chunk_size=chunk_size),
        num_free_blocks=blocks,
        max_model_len=MAX_MODEL_LEN,
        block_size=block_size,
        max_num_batched_tokens=draw(st.integers(1, 24)),
        max_num_seqs=draw(st.integers(1, 6)),
        max_prompt_logprob_rows=draw(st.integers(1, 6)),
    )


@settings(max_examples=300, deadline=None)
@given(harness=harnesses(), workloads=st.lists(WORKLOADS, min_size=1, max_size=8), expert_is_lost=st.booleans())
def test_every_request_ends_exactly_once_with_the_right_tokens(
    harness: Harness, workloads: list[Workload], expert_is_lost: bool
) -> None:
    harness.model.lost_token_ids = {LOST_TOKEN_ID} if expert_is_lost else set()
    aborted = play(harness, workloads)
    harness.assert_all_blocks_free()
    for index, workload in enumerate(workloads):
        outputs = harness.outputs[f"r{index}"]
        ends = [output.finish_reason for output in outputs if output.finish_reason]
        assert len(ends) == (0 if f"r{index}" in aborted else 1)
        if ends == [FinishReason.LENGTH] and not outputs[-1].degraded:
            check_tokens(harness, f"r{index}", workload)


@settings(max_examples=30, deadline=None)
@given(workloads=st.lists(WORKLOADS, min_size=4, max_size=8))
def test_what_a_degraded_run_leaves_in_the_cache_is_sound(workloads: list[Workload]) -> None:
    harness = Harness(max_model_len=MAX_MODEL_LEN, max_num_batched_tokens=5)
    harness.model.lost_token_ids = {LOST_TOKEN_ID}
    play(harness, workloads)
    harness.model.lost_token_ids = set()
    for workload in workloads:
        harness.generate(workload.prompt_ids, max_tokens=3)
        assert list(harness.token_ids.values())[-1] == true_greedy(workload.prompt_ids, 3, harness.config)


@settings(max_examples=200, deadline=None)
@given(
    harness=harnesses(),
    workloads=st.lists(WORKLOADS, min_size=1, max_size=8),
    outages=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 8)), max_size=4),
)
def test_outages_that_end_cost_who_waits_nothing_but_time(
    harness: Harness, workloads: list[Workload], outages: list[tuple[int, int]]
) -> None:
    workloads = [replace(workload, may_degrade=False) for workload in workloads]
    aborted = play(harness, workloads, policy=MissingExpertPolicy.WAIT, outages=outages)
    harness.assert_all_blocks_free()
    for index, workload in enumerate(workloads):
        if f"r{index}" not in aborted:
            outputs = harness.outputs[f"r{index}"]
            assert [output.finish_reason for output in outputs if output.finish_reason] == [FinishReason.LENGTH]
            check_tokens(harness, f"r{index}", workload)


def play(
    harness: Harness,
    workloads: list[Workload],
    max_steps: int = 3000,
    policy: MissingExpertPolicy | None = None,
    outages: Sequence[tuple[int, int]] = (),
) -> set[str]:
    """Runs all workloads to their ends; the ids of those that were aborted before. policy is of those that may not
    degrade. outages: (first step, number of steps) in which an expert is lost; with their ends an epoch is adopted."""
    aborted: set[str] = set()
    to_come = dict(enumerate(workloads))
    for step in range(max_steps):
        if outages:
            is_lost = any(first <= step < first + length for first, length in outages)
            harness.model.lost_token_ids = {LOST_TOKEN_ID} if is_lost else set()
            if not is_lost:
                harness.engine.resume_parked()
        for index, workload in tuple(to_come.items()):
            if workload.arrives_at_step <= step:
                add(harness, f"r{index}", to_come.pop(index), policy)
        for index, workload in enumerate(workloads):
            if abort_is_due(workload, step) and f"r{index}" in harness.outputs and not has_ended(harness, f"r{index}"):
                harness.engine.abort(f"r{index}")
                harness.engine.check_integrity()
                aborted.add(f"r{index}")
        if harness.engine.has_work:
            harness.step()
        elif not to_come and not harness.engine.stats().num_parked:
            return aborted
    raise AssertionError("the workloads do not end")


def abort_is_due(workload: Workload, step: int) -> bool:
    return workload.aborted_after_steps is not None and step == workload.arrives_at_step + workload.aborted_after_steps


def has_ended(harness: Harness, request_id: str) -> bool:
    return any(output.finish_reason for output in harness.outputs[request_id])


def add(harness: Harness, request_id: str, workload: Workload, policy: MissingExpertPolicy | None = None) -> None:
    prompt_ids = workload.prompt_ids
    resume_ids = true_greedy(prompt_ids, workload.num_resumed, harness.config)
    harness.add(
        request_id,
        prompt_ids,
        resume_ids=resume_ids,
        max_tokens=workload.max_tokens,
        num_prompt_logprobs=0 if workload.wants_prompt_logprobs else None,
        on_missing_expert=MissingExpertPolicy.SHARED_ONLY if workload.may_degrade else policy,
    )


def check_tokens(harness: Harness, request_id: str, workload: Workload) -> None:
    prompt_ids = workload.prompt_ids
    num_tokens = min(workload.max_tokens, MAX_MODEL_LEN - len(prompt_ids))
    expected = true_greedy(prompt_ids, num_tokens, harness.config)
    assert harness.token_ids[request_id] == expected[workload.num_resumed :]
    entries = harness.outputs[request_id][0].prompt_logprobs
    wants_them = workload.wants_prompt_logprobs and not workload.num_resumed
    assert [entry.token_id for entry in (entries or []) if entry] == (prompt_ids[1:] if wants_them else [])
