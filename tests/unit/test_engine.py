"""The engine over a model that notices wrong block tables."""

from __future__ import annotations

import pytest
import torch
from fake_model import EOS, VOCAB_SIZE, Harness, fake_config, tokens, true_greedy, true_logits

from experts.placement import ShardId
from router.messages import ErrorCode, FinishReason, MissingExpertPolicy


@pytest.mark.parametrize("budget", [1, 3, 16, 200])
@pytest.mark.parametrize("chunk_size", [8, None])
def test_greedy_tokens_follow_the_model_whatever_the_budget(budget: int, chunk_size: int | None) -> None:
    harness = Harness(config=fake_config(attention_chunk_size=chunk_size), max_num_batched_tokens=budget)
    prompts = {f"r{n}": tokens(n, seed=n) for n in (1, 3, 4, 5, 8, 9, 21, 40)}
    for request_id, prompt_ids in prompts.items():
        harness.add(request_id, prompt_ids, max_tokens=12)
    produced = harness.run()
    assert produced == {name: true_greedy(prompt_ids, 12, harness.config) for name, prompt_ids in prompts.items()}
    assert max(harness.model.computed) <= budget
    harness.assert_all_blocks_free()


def test_preempted_sequences_recompute_to_the_same_tokens() -> None:
    harness = Harness(num_free_blocks={"global": 12, "local": 12}, max_model_len=48)
    prompts = {f"r{n}": tokens(7 + n, seed=n) for n in range(5)}
    for request_id, prompt_ids in prompts.items():
        harness.add(request_id, prompt_ids, max_tokens=20)
    produced = harness.run()
    assert produced == {name: true_greedy(prompt_ids, 20, harness.config) for name, prompt_ids in prompts.items()}
    assert harness.engine.stats().num_preemptions > 0
    harness.assert_all_blocks_free()


def test_the_first_come_is_the_first_to_end() -> None:
    harness = Harness(num_free_blocks={"global": 8, "local": 8}, max_model_len=32)
    for index in range(6):
        harness.add(f"r{index}", tokens(9, seed=index), max_tokens=15)
    ended: list[str] = []
    while harness.engine.has_work:
        ended += [output.request_id for output in harness.step() if output.finish_reason]
    assert ended == [f"r{index}" for index in range(6)]
    assert harness.engine.stats().num_preemptions > 0


def test_a_sequence_waits_until_all_of_its_prompt_fits() -> None:
    harness = Harness(num_free_blocks={"global": 8, "local": 8}, max_model_len=32, max_num_batched_tokens=4)
    harness.add("first", tokens(14, seed=1), max_tokens=6)
    harness.add("long", tokens(20, seed=2), max_tokens=6)
    while harness.end("first") is None:
        harness.step()
        assert harness.engine.stats().num_waiting == 1
    harness.run()
    assert harness.engine.stats().num_preemptions == 0


def test_local_blocks_of_a_passed_chunk_are_released() -> None:
    harness = Harness()
    harness.add("r", tokens(30), max_tokens=10)
    used = []
    while harness.engine.has_work:
        harness.step()
        stats = harness.engine.stats()
        used.append(stats.num_blocks["local"] - stats.num_free_blocks["local"])
    assert 0 in used[:-1], "at a chunk boundary nothing is kept"
    assert max(used) <= 2, "a chunk of 8 is two blocks"


def test_a_prompt_longer_than_the_local_pool_goes_chunk_by_chunk() -> None:
    harness = Harness(num_free_blocks={"global": 32, "local": 2}, max_num_batched_tokens=64)
    assert harness.generate(tokens(60), max_tokens=3)[-1].finish_reason is FinishReason.LENGTH
    assert max(harness.model.computed) == 8


# Prefix caching


def test_a_shared_prefix_is_not_computed_twice() -> None:
    harness = Harness(max_num_batched_tokens=64)
    shared = tokens(21)
    first = harness.generate([*shared, 5], max_tokens=4)
    second = harness.generate([*shared, 6], max_tokens=4)
    assert first[-1].num_cached_tokens == 0
    assert second[-1].num_cached_tokens == 20
    assert harness.token_ids["request-1"] == true_greedy([*shared, 6], 4, harness.config)
    assert harness.engine.stats().num_cached_tokens == 20


def test_sequences_share_a_prefix_while_both_run() -> None:
    harness = Harness(max_num_batched_tokens=64)
    shared = tokens(24)
    harness.add("first", [*shared, 5], max_tokens=20)
    harness.step()
    harness.add("second", [*shared, 6], max_tokens=20)
    harness.step()
    stats = harness.engine.stats()
    assert stats.num_blocks["global"] - stats.num_free_blocks["global"] == 6 + 1 + 1
    produced = harness.run()
    assert produced["second"] == true_greedy([*shared, 6], 20, harness.config)
    harness.assert_all_blocks_free()


def test_of_a_fully_cached_prompt_one_token_is_computed() -> None:
    harness = Harness(max_num_batched_tokens=64)
    prompt_ids = tokens(16)
    harness.generate(prompt_ids, max_tokens=1)
    again = harness.generate(prompt_ids, max_tokens=1)
    assert again[-1].num_cached_tokens == 12
    assert harness.token_ids["request-1"] == harness.token_ids["request-0"]


def test_a_hit_inside_a_chunk_without_its_local_blocks_is_cut_to_the_boundary() -> None:
    harness = Harness(num_free_blocks={"global": 64, "local": 4}, max_num_batched_tokens=8)
    prompt_ids = tokens(22)
    harness.generate(prompt_ids, max_tokens=1)
    for index in range(3):  # other chunks push the local blocks of the first prompt out
        harness.generate(tokens(8, seed=100 + index), max_tokens=1)
    assert harness.generate(prompt_ids, max_tokens=4)[-1].num_cached_tokens == 16
    assert harness.token_ids["request-4"] == true_greedy(prompt_ids, 4, harness.config)


@pytest.mark.parametrize("other", [{"cache_salt": "another tenant"}, {"num_prompt_logprobs": 0}])
def test_no_hit_across_salts_or_for_prompt_logprobs(other: dict[str, object]) -> None:
    harness = Harness()
    prompt_ids = tokens(21)
    harness.generate(prompt_ids, max_tokens=1)
    assert harness.generate(prompt_ids, max_tokens=1, **other)[-1].num_cached_tokens == 0


def test_the_longest_idle_block_is_evicted_first() -> None:
    harness = Harness(num_free_blocks={"global": 8, "local": 8}, max_model_len=32)
    old, recent = tokens(17, seed=1), tokens(13, seed=2)
    harness.generate(old, max_tokens=1)
    harness.generate(recent, max_tokens=1)
    harness.generate(tokens(9, seed=3), max_tokens=1)
    assert harness.generate(recent, max_tokens=1)[-1].num_cached_tokens == 12
    assert harness.generate(old, max_tokens=1)[-1].num_cached_tokens < 16


# Requests that end early


def test_an_abort_frees_blocks_at_once_and_gives_no_output() -> None:
    harness = Harness()
    harness.add("gone", tokens(30), max_tokens=20)
    harness.add("waiting", tokens(30, seed=1), max_tokens=20)
    harness.add("stays", tokens(5, seed=2), max_tokens=20)
    harness.step()
    harness.engine.abort("gone")
    harness.engine.abort("waiting")
    harness.engine.check_integrity()
    harness.assert_all_blocks_free()
    harness.engine.abort("never seen")
    assert harness.run()["stays"] == true_greedy(tokens(5, seed=2), 20, harness.config)
    assert harness.outputs["gone"] == []
    harness.add("gone", tokens(3), max_tokens=1)  # the name is free again


def test_end_tokens_end_a_sequence_and_are_sent() -> None:
    harness = Harness()
    expected = true_greedy(tokens(6), 30, harness.config)
    stop = expected[4]
    outputs = harness.generate(tokens(6), max_tokens=30, stop_token_ids=(stop,))
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert harness.token_ids["request-0"] == expected[: expected.index(stop) + 1]


def test_the_models_end_token_counts_unless_ignored() -> None:
    harness = Harness()
    bias = {EOS: 100.0}
    assert len(harness.generate(tokens(6), max_tokens=9, ignore_eos=False, logit_bias=bias)) == 1
    assert harness.end("request-0") is FinishReason.STOP
    assert len(harness.generate(tokens(6), max_tokens=9, ignore_eos=True, logit_bias=bias)) == 9
    assert harness.end("request-1") is FinishReason.LENGTH


def test_end_tokens_wait_for_min_tokens() -> None:
    harness = Harness()
    fields = {"logit_bias": {EOS: 100.0, 7: 50.0}, "stop_token_ids": (7,), "ignore_eos": False}
    harness.generate(tokens(6), max_tokens=9, min_tokens=4, **fields)
    produced = harness.token_ids["request-0"]
    assert len(produced) == 5
    assert {EOS, 7}.isdisjoint(produced[:4])
    assert produced[4] == EOS


def test_max_model_len_ends_a_sequence() -> None:
    harness = Harness(max_model_len=20)
    outputs = harness.generate(tokens(15), max_tokens=100)
    assert len(outputs) == 5
    assert outputs[-1].finish_reason is FinishReason.LENGTH


# Resuming


@pytest.mark.parametrize("num_resumed", [1, 3, 11])
def test_a_resumed_sequence_goes_on_as_if_never_broken(num_resumed: int) -> None:
    harness = Harness()
    fields = {
        "max_tokens": 12,
        "temperature": 1.5,
        "seed": 77,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
        "num_logprobs": 1,
    }
    whole = harness.generate(tokens(9), **fields)
    all_ids = harness.token_ids["request-0"]
    rest = harness.generate(tokens(9), resume_ids=all_ids[:num_resumed], **fields)
    assert harness.token_ids["request-1"] == all_ids[num_resumed:]
    assert [output.logprobs for output in rest] == [output.logprobs for output in whole[num_resumed:]]
    assert rest[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("resume_ids", "reason"),
    [([5, 6, 7], FinishReason.LENGTH), ([5, EOS], FinishReason.STOP), ([9], FinishReason.STOP)],
)
def test_resumed_output_that_has_ended_ends_at_once(resume_ids: list[int], reason: FinishReason) -> None:
    harness = Harness()
    harness.add("r", tokens(4), resume_ids=resume_ids, max_tokens=3, ignore_eos=False, stop_token_ids=(9,))
    assert harness.engine.has_work
    harness.step()
    assert not harness.engine.has_work
    assert [(output.finish_reason, output.token_ids) for output in harness.outputs["r"]] == [(reason, [])]
    assert harness.model.computed == []


def test_a_resumed_end_token_below_min_tokens_is_no_end() -> None:
    harness = Harness()
    outputs = harness.generate(tokens(4), resume_ids=[EOS], max_tokens=4, min_tokens=2, ignore_eos=False)
    assert len(outputs) >= 1
    assert len(harness.token_ids["request-0"]) >= 1


def test_an_abort_takes_back_an_end_that_was_not_yet_told() -> None:
    harness = Harness()
    harness.add("r", tokens(4), resume_ids=[1], max_tokens=1)
    harness.engine.abort("r")
    assert not harness.engine.has_work


# Log probabilities


@pytest.mark.parametrize("budget", [1, 5, 64])
@pytest.mark.parametrize("max_rows", [2, 64])
def test_prompt_logprobs_are_whole_whatever_the_chunking(budget: int, max_rows: int) -> None:
    harness = Harness(max_num_batched_tokens=budget, max_prompt_logprob_rows=max_rows)
    prompt_ids = tokens(19)
    harness.add("other", tokens(7, seed=9), max_tokens=30, num_prompt_logprobs=1)
    outputs = harness.generate(prompt_ids, max_tokens=2, num_prompt_logprobs=2, num_logprobs=0)
    entries = outputs[0].prompt_logprobs
    assert entries is not None
    assert outputs[1].prompt_logprobs is None
    assert entries[0] is None
    assert len(entries) == len(prompt_ids)
    for position in range(1, len(prompt_ids)):
        expected = torch.log_softmax(true_logits(prompt_ids[:position], harness.config), dim=-1)
        entry = entries[position]
        assert entry is not None
        assert (entry.token_id, entry.logprob) == (prompt_ids[position], expected[prompt_ids[position]].item())
        assert [logprob for _, logprob in entry.top] == expected.topk(2).values.tolist()


def test_prompt_logprobs_survive_preemption() -> None:
    harness = Harness(num_free_blocks={"global": 10, "local": 10}, max_model_len=40, max_prompt_logprob_rows=2)
    harness.add("old", tokens(5), max_tokens=30)
    harness.add("young", tokens(30, seed=1), max_tokens=2, num_prompt_logprobs=0)
    harness.run()
    entries = harness.outputs["young"][0].prompt_logprobs
    assert harness.engine.stats().num_preemptions > 0
    assert entries is not None
    assert [entry.token_id for entry in entries if entry] == tokens(30, seed=1)[1:]


def test_a_prompt_of_one_token_has_one_empty_prompt_logprob() -> None:
    harness = Harness()
    assert harness.generate([5], max_tokens=1, num_prompt_logprobs=0)[0].prompt_logprobs == [None]


# Experts that cannot be reached


def test_with_policy_fail_only_the_sequence_concerned_ends() -> None:
    harness = Harness()
    harness.model.lost_token_ids = {39}
    harness.dispatcher.lost = {ShardId("s1"): "shard s1 at host:1, layer 3, phase wait: end of file"}
    harness.add("hit", [3, 4, 39, 5], max_tokens=5)
    harness.add("unharmed", [3, 4, 5], max_tokens=1)
    harness.run()
    output = harness.outputs["hit"][0]
    assert (output.finish_reason, output.error_code) == (FinishReason.ERROR, ErrorCode.UNAVAILABLE)
    assert output.error is not None
    assert "shard s1 at host:1, layer 3" in output.error
    assert harness.token_ids["unharmed"] == true_greedy([3, 4, 5], 1, harness.config)
    harness.assert_all_blocks_free()


def test_with_policy_shared_only_the_sequence_goes_on_degraded_and_shares_nothing_since() -> None:
    harness = Harness()
    prompt_ids = [*range(3, 11), 39, *range(11, 20)]
    harness.model.lost_token_ids = {39}
    degraded = harness.generate(prompt_ids, max_tokens=6, on_missing_expert=MissingExpertPolicy.SHARED_ONLY)
    assert [output.degraded for output in degraded] == [True] * 6
    assert degraded[-1].finish_reason is FinishReason.LENGTH
    assert harness.engine.stats().num_degraded_tokens >= 1
    harness.model.lost_token_ids = set()
    healthy = harness.generate(prompt_ids, max_tokens=6)
    assert [output.degraded for output in healthy] == [False] * 6
    assert harness.token_ids["request-1"] == true_greedy(prompt_ids, 6, harness.config)
    assert healthy[-1].num_cached_tokens == 0, "a prompt of one step: all of it was in the degraded step"


def test_blocks_from_before_the_degraded_step_are_shared() -> None:
    harness = Harness(max_num_batched_tokens=8)
    prompt_ids = [*range(3, 11), 39, *range(11, 20)]
    harness.model.lost_token_ids = {39}
    harness.generate(prompt_ids, max_tokens=2, on_missing_expert=MissingExpertPolicy.SHARED_ONLY)
    harness.model.lost_token_ids = set()
    assert harness.generate(prompt_ids, max_tokens=6)[-1].num_cached_tokens == 8
    assert harness.token_ids["request-1"] == true_greedy(prompt_ids, 6, harness.config)


def test_logits_that_are_not_finite_end_one_sequence() -> None:
    harness = Harness()
    harness.model.broken_token_ids = {39}
    harness.add("broken", [3, 39], max_tokens=5, temperature=1.0)
    harness.add("unharmed", [3, 4, 5], max_tokens=5)
    harness.run()
    assert harness.outputs["broken"][0].error_code is ErrorCode.INTERNAL
    assert harness.token_ids["unharmed"] == true_greedy([3, 4, 5], 5, harness.config)


# Requests that are refused


@pytest.mark.parametrize(
    ("prompt_ids", "fields", "message"),
    [
        ([], {}, "prompt_ids must not be empty"),
        ([3] * 128, {}, "prompt_ids has 128 tokens, max_model_len 128"),
        ([3, VOCAB_SIZE], {}, "prompt_ids has token id 40"),
        ([-1, 3], {}, "prompt_ids has token id -1"),
        ([3], {"resume_ids": [99]}, "resume_ids has token id 99"),
        ([3], {"stop_token_ids": (-7,)}, "stop_token_ids has token id -7"),
        ([3], {"logit_bias": {41: 1.0}}, "logit_bias has token id 41"),
        ([3], {"num_logprobs": 21}, "num_logprobs must be at most 20, not 21"),
        ([3], {"num_prompt_logprobs": -1}, "num_prompt_logprobs must be at most 20, not -1"),
        ([3] * 100, {"max_tokens": 22}, "max_tokens 22 after 100 prompt tokens does not fit the KV cache"),
        ([3], {"min_tokens": 1, "stop_token_ids": tuple(range(VOCAB_SIZE))}, "leaves no token to sample"),
    ],
)
def test_bad_requests_are_refused_by_field_and_value(
    prompt_ids: list[int], fields: dict[str, object], message: str
) -> None:
    harness = Harness(num_free_blocks={"global": 30, "local": 30})
    with pytest.raises(ValueError, match=message):
        harness.add("r", prompt_ids, **fields)
    assert not harness.engine.has_work
    assert len(harness.generate([3], max_tokens=2)) == 2


def test_a_sequence_that_just_fits_alone_is_taken() -> None:
    harness = Harness(num_free_blocks={"global": 30, "local": 2})
    assert len(harness.generate([3] * 100, max_tokens=21)) == 21
    with pytest.raises(ValueError, match="does not fit"):
        Harness(num_free_blocks={"global": 30, "local": 1}).add("r", [3] * 8, max_tokens=1)


def test_an_open_request_id_is_refused() -> None:
    harness = Harness()
    harness.add("r", [3], max_tokens=2)
    with pytest.raises(ValueError, match="request_id 'r' is open already"):
        harness.add("r", [4], max_tokens=2)


def test_the_whole_vocabulary_of_logprobs_needs_no_limit() -> None:
    harness = Harness(max_logprobs=-1)
    (output,) = harness.generate([3], max_tokens=1, num_logprobs=-1)
    assert output.logprobs is not None
    assert len(output.logprobs[0].top) == VOCAB_SIZE


def test_an_exception_of_the_model_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness()
    harness.add("r", [3], max_tokens=2)

    def broken_forward(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(harness.model, "forward", broken_forward)
    with pytest.raises(RuntimeError, match="out of memory"):
        harness.step()


@pytest.mark.parametrize(
    ("default", "own", "goes_on"),
    [
        (MissingExpertPolicy.SHARED_ONLY, None, True),
        (MissingExpertPolicy.SHARED_ONLY, MissingExpertPolicy.FAIL, False),
        (MissingExpertPolicy.FAIL, None, False),
        (MissingExpertPolicy.WAIT, MissingExpertPolicy.SHARED_ONLY, True),
    ],
)
def test_a_requests_own_policy_comes_before_the_engines(
    default: MissingExpertPolicy, own: MissingExpertPolicy | None, goes_on: bool
) -> None:
    harness = Harness(on_missing_expert=default)
    harness.model.lost_token_ids = {39}
    outputs = harness.generate([3, 39], max_tokens=2, on_missing_expert=own)
    assert (outputs[-1].finish_reason is FinishReason.LENGTH) == goes_on


# What its gateway hears of a request


def test_a_request_with_a_gateway_tells_of_its_first_step_and_only_of_that() -> None:
    harness = Harness(max_num_batched_tokens=4)
    harness.add("far", tokens(10), max_tokens=3, return_address="gateway:1")
    harness.run()
    outputs = harness.outputs["far"]
    assert [len(output.token_ids) for output in outputs] == [0, 1, 1, 1]
    assert [output.since_begin_s is None for output in outputs] == [False, True, True, True]
    assert harness.token_ids["far"] == true_greedy(tokens(10), 3, harness.config)


def test_a_first_step_that_brings_a_token_tells_both_at_once_also_after_a_preemption() -> None:
    harness = Harness(num_free_blocks={"global": 12, "local": 12}, max_model_len=48)
    for index in range(5):
        harness.add(f"r{index}", tokens(7 + index, seed=index), max_tokens=20, return_address="gateway:1")
    harness.run()
    assert harness.engine.stats().num_preemptions > 0
    for outputs in harness.outputs.values():
        told = [output.since_begin_s for output in outputs]
        assert told[0] is not None
        assert 0 <= told[0] < 60
        assert told[1:] == [None] * (len(told) - 1)
