"""Sequences that wait for an expert which no living shard has, and what goes on beside them."""

from __future__ import annotations

from typing import Any

import pytest
from fake_model import EXPERT_WAIT_S, Harness, tokens, true_greedy

from experts.placement import ShardId
from router.messages import ErrorCode, FinishReason, MissingExpertPolicy

LOST = 39
HIT = [3, 4, LOST, 5]
LONG_HIT = [*range(3, 11), LOST, *range(11, 20)]


def waiting(**limits: Any) -> Harness:
    harness = Harness(on_missing_expert=MissingExpertPolicy.WAIT, **limits)
    harness.model.lost_token_ids = {LOST}
    harness.dispatcher.lost = {ShardId("s1"): "shard s1 at host:1, layer 3, phase wait: end of file"}
    return harness


def bring_back(harness: Harness) -> None:
    harness.model.lost_token_ids = set()
    harness.dispatcher.lost = {}
    harness.engine.resume_parked()


def num_used_blocks(harness: Harness) -> int:
    stats = harness.engine.stats()
    return stats.num_blocks["global"] - stats.num_free_blocks["global"]


def test_a_sequence_that_misses_an_expert_waits_for_the_next_epoch_and_others_go_on() -> None:
    harness = waiting()
    harness.add("hit", HIT, max_tokens=5)
    harness.add("unharmed", [3, 4, 5], max_tokens=3)
    harness.run()
    assert harness.outputs["hit"] == []
    assert harness.token_ids["unharmed"] == true_greedy([3, 4, 5], 3, harness.config)
    assert harness.engine.stats().num_parked == 1
    bring_back(harness)
    harness.run()
    assert harness.token_ids["hit"] == true_greedy(HIT, 5, harness.config)
    assert not any(output.degraded for output in harness.outputs["hit"])
    harness.assert_all_blocks_free()


def test_while_all_wait_there_is_no_work() -> None:
    harness = waiting()
    harness.add("hit", HIT, max_tokens=5)
    harness.step()
    assert not harness.engine.has_work
    num_steps = harness.engine.stats().num_steps
    harness.run()
    assert harness.engine.stats().num_steps == num_steps
    bring_back(harness)
    assert harness.engine.has_work


def test_an_expert_may_be_lost_in_the_middle_of_a_sequence_and_more_than_once() -> None:
    harness = waiting()
    harness.model.lost_token_ids = set()
    harness.add("r", tokens(9), max_tokens=30)
    num_outages = 0
    while harness.end("r") is None:
        harness.step()
        if harness.engine.stats().num_steps % 5 == 0:
            harness.model.lost_token_ids = set(range(40))
            harness.step()
            assert harness.engine.stats().num_parked == 1
            bring_back(harness)
            num_outages += 1
    assert num_outages >= 4
    assert harness.token_ids["r"] == true_greedy(tokens(9), 30, harness.config)


def test_nothing_of_a_step_that_missed_an_expert_is_kept_or_shared() -> None:
    harness = waiting(max_num_batched_tokens=8)
    harness.add("hit", LONG_HIT, max_tokens=6)
    harness.run()
    assert num_used_blocks(harness) == 2, "of the first step, which missed nothing"
    harness.add("same", LONG_HIT, max_tokens=6)
    harness.run()
    bring_back(harness)
    harness.run()
    assert harness.outputs["same"][-1].num_cached_tokens == 8
    assert harness.token_ids["hit"] == harness.token_ids["same"] == true_greedy(LONG_HIT, 6, harness.config)


def test_when_the_time_is_over_only_who_waits_ends_and_is_told_for_whom() -> None:
    harness = waiting()
    harness.add("hit", HIT, max_tokens=5)
    harness.step()
    harness.now_s = EXPERT_WAIT_S - 0.1
    assert not harness.engine.has_work
    harness.now_s = EXPERT_WAIT_S
    assert harness.engine.has_work
    harness.add("unharmed", [3, 4, 5], max_tokens=1)
    harness.run()
    output = harness.outputs["hit"][0]
    assert (output.finish_reason, output.error_code) == (FinishReason.ERROR, ErrorCode.UNAVAILABLE)
    assert output.error is not None
    assert "could not be reached for 120 s: shard s1 at host:1, layer 3" in output.error
    assert harness.end("unharmed") is FinishReason.LENGTH
    harness.assert_all_blocks_free()


def test_an_epoch_that_does_not_help_gives_no_time_anew_and_a_token_does() -> None:
    harness = waiting()
    harness.add("hit", HIT, max_tokens=5)
    harness.step()
    harness.now_s = EXPERT_WAIT_S - 1
    harness.engine.resume_parked()
    harness.step()
    bring_back(harness)
    harness.step()
    assert len(harness.token_ids["hit"]) == 1
    harness.model.lost_token_ids = set(range(40))
    harness.step()
    assert harness.engine.stats().num_parked == 1
    harness.now_s += EXPERT_WAIT_S - 1
    assert not harness.engine.has_work
    harness.engine.resume_parked()
    harness.step()
    harness.now_s += 1
    harness.run()
    assert harness.end("hit") is FinishReason.ERROR


def test_a_request_that_waits_can_be_aborted() -> None:
    harness = waiting()
    harness.add("hit", HIT, max_tokens=5)
    harness.step()
    harness.engine.abort("hit")
    harness.engine.check_integrity()
    assert harness.engine.stats().num_parked == 0
    assert not harness.engine.has_work
    harness.assert_all_blocks_free()


@pytest.mark.parametrize("limits", [{"max_num_seqs": 2}, {"num_free_blocks": {"global": 10, "local": 10}}])
def test_those_that_wait_are_in_nobodys_way(limits: dict[str, Any]) -> None:
    """They fill the batch, or the cache; the first of them is the oldest."""
    harness = waiting(max_model_len=32, **limits)
    prompts = {f"hit-{index}": [*tokens(11, seed=index), LOST] for index in range(2)}
    for request_id, prompt_ids in prompts.items():
        harness.model.lost_token_ids = set()
        harness.add(request_id, prompt_ids, max_tokens=12)
        harness.step()
    harness.model.lost_token_ids = set(range(40))
    harness.step()
    assert harness.engine.stats().num_parked == 2
    harness.model.lost_token_ids = {LOST}
    harness.add("unharmed", tokens(17, seed=7), max_tokens=12)
    harness.run()
    assert harness.token_ids["unharmed"] == true_greedy(tokens(17, seed=7), 12, harness.config)
    assert harness.engine.stats().num_preemptions > 0
    bring_back(harness)
    harness.run()
    for request_id, prompt_ids in prompts.items():
        assert harness.token_ids[request_id] == true_greedy(prompt_ids, 12, harness.config)
    harness.assert_all_blocks_free()


def test_those_that_wait_give_up_their_blocks_before_anybody_who_moves() -> None:
    harness = waiting(max_model_len=32, num_free_blocks={"global": 10, "local": 10})
    harness.model.lost_token_ids = set()
    for index in range(2):
        harness.add(f"hit-{index}", tokens(12, seed=index), max_tokens=12)
        harness.step()
    harness.model.lost_token_ids = set(range(40))
    harness.step()
    assert (harness.engine.stats().num_parked, num_used_blocks(harness)) == (2, 7)
    harness.model.lost_token_ids = set()
    harness.add("unharmed", tokens(5, seed=7), max_tokens=14)
    harness.run()
    assert harness.token_ids["unharmed"] == true_greedy(tokens(5, seed=7), 14, harness.config)
    assert harness.engine.stats().num_preemptions == 1
    assert sum(harness.model.computed) == (12) + (1 + 12) + (1 + 1) + (5 + 13), "who moves computes no token twice"
