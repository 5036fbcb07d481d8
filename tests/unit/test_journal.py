import pytest

from cluster.front.choice_text import ChoiceText
from cluster.front.detokenizer import NoDetokenizer, PrefixDetokenizer
from cluster.front.journal import ChoiceJournal, ChoicePlan, Delta
from cluster.front.stop_matcher import StopMatcher, StopStrings
from router.messages import FinishReason, SequenceOutput, TokenLogprobs
from router.sampling_params import SamplingParams

END = 2


def journal(
    *, resume: list[int] | None = None, finished: bool = False, text: ChoiceText | None = None, **params: object
) -> ChoiceJournal:
    plan = ChoicePlan(
        engine_id="r/0",
        prompt_ids=[7, 8],
        params=SamplingParams(**{"max_tokens": 5, "seed": 3, **params}),  # type: ignore[arg-type]
        resume_ids=resume or [],
        already_finished=finished,
    )
    return ChoiceJournal(plan, text or ChoiceText(NoDetokenizer()))


def letters(*stop: str) -> ChoiceText:
    """Token 0 is "a", 1 is "b", and so on."""
    detokenizer = PrefixDetokenizer(lambda ids: "".join(chr(ord("a") + token_id) for token_id in ids))
    return ChoiceText(detokenizer, stop=StopMatcher(StopStrings(stop), include=False))


def output(attempt: int, *token_ids: int, **fields: object) -> SequenceOutput:
    return SequenceOutput(request_id="r/0", attempt=attempt, token_ids=list(token_ids), **fields)  # type: ignore[arg-type]


def test_a_second_submission_carries_every_token_that_has_come() -> None:
    entry = journal(resume=[10])
    first = entry.submit("gateway:1")
    assert (first.attempt, first.prompt_ids, first.resume_ids) == (0, [7, 8], [10])
    entry.accept(output(0, 11))
    entry.accept(output(0, 12, 13))
    second = entry.submit("gateway:1")
    assert (second.attempt, second.resume_ids, second.params) == (1, [10, 11, 12, 13], first.params)
    assert first.resume_ids == [10]


def test_late_tokens_of_an_old_attempt_are_dropped() -> None:
    entry = journal()
    entry.submit("g:1")
    entry.accept(output(0, 11))
    entry.submit("g:1")
    assert entry.accept(output(0, 12)) is None
    assert entry.num_completion_tokens == 1


def test_nothing_is_accepted_after_the_end() -> None:
    entry = journal()
    entry.submit("g:1")
    last = entry.accept(output(0, END, finish_reason=FinishReason.STOP))
    assert last is not None
    assert last.finish_reason is FinishReason.STOP
    assert entry.accept(output(0, 12)) is None


def test_prompt_logprobs_come_once_however_often_the_prompt_is_computed() -> None:
    entry = journal(num_prompt_logprobs=0)
    of_prompt = [None, TokenLogprobs(token_id=8, logprob=-1.0)]
    assert entry.submit("g:1").params.num_prompt_logprobs == 0
    delta = entry.accept(output(0, 11, prompt_logprobs=of_prompt))
    assert delta is not None
    assert delta.prompt_logprobs == (of_prompt[1],)
    assert entry.submit("g:1").params.num_prompt_logprobs is None


def test_a_client_that_resumes_has_its_prompt_logprobs() -> None:
    assert journal(resume=[10], num_prompt_logprobs=0).submit("g:1").params.num_prompt_logprobs is None


def test_cached_tokens_of_a_resubmission_are_not_the_clients_matter() -> None:
    entry = journal()
    entry.submit("g:1")
    entry.accept(output(0, 11, num_cached_tokens=1))
    entry.submit("g:1")
    entry.accept(output(1, 12, num_cached_tokens=2))
    assert entry.num_cached_tokens == 1


def test_once_degraded_a_choice_stays_so() -> None:
    entry = journal()
    entry.submit("g:1")
    entry.accept(output(0, 11, degraded=True))
    entry.submit("g:1")
    delta = entry.accept(output(1, 12))
    assert delta is not None
    assert delta.degraded


def test_a_choice_whose_end_the_client_has_seen_is_silent() -> None:
    entry = journal(resume=[10], finished=True)
    assert entry.is_finished
    assert entry.num_completion_tokens == 1


def test_deltas_join_in_order() -> None:
    first = Delta(choice_index=1, token_ids=(1, 2), text="ab", degraded=True)
    second = Delta(choice_index=1, token_ids=(3,), text="c", finish_reason=FinishReason.LENGTH)
    joined = Delta(choice_index=1, token_ids=(1, 2, 3), text="abc", finish_reason=FinishReason.LENGTH, degraded=True)
    assert first.followed_by(second) == joined
    with pytest.raises(ValueError, match="choice_index 0 cannot follow 1"):
        first.followed_by(Delta(choice_index=0))


def test_a_stop_string_ends_a_choice_with_the_token_that_completes_it() -> None:
    entry = journal(text=letters("cd"))
    entry.submit("g:1")
    logprobs = [TokenLogprobs(token_id=token_id, logprob=-1.0) for token_id in (1, 2, 3, 4)]
    delta = entry.accept(output(0, 1, 2, 3, 4, logprobs=logprobs, finish_reason=FinishReason.LENGTH))
    assert delta is not None
    assert (delta.token_ids, delta.text, delta.finish_reason) == ((1, 2, 3), "b", FinishReason.STOP)
    assert delta.logprobs == tuple(logprobs[:3])
    assert entry.is_finished
    assert entry.num_completion_tokens == 3
    assert entry.accept(output(0, 5)) is None


def test_a_stop_string_is_found_across_the_loss_of_a_router() -> None:
    entry = journal(text=letters("cde"))
    entry.submit("g:1")
    first = entry.accept(output(0, 1, 2))
    assert entry.submit("g:1").resume_ids == [1, 2]
    entry.accept(output(1, 3))
    assert entry.submit("g:1").resume_ids == [1, 2, 3]
    last = entry.accept(output(2, 4, 5))
    assert first is not None
    assert last is not None
    assert (first.text, last.text, last.token_ids) == ("b", "", (4,))
    assert last.finish_reason is FinishReason.STOP


def test_a_stop_string_is_found_across_the_break_of_a_clients_stream() -> None:
    entry = journal(resume=[1, 2], text=letters("cd"))
    entry.submit("g:1")
    delta = entry.accept(output(0, 3, 4))
    assert delta is not None
    assert (delta.token_ids, delta.text, delta.finish_reason) == ((3,), "", FinishReason.STOP)


def test_a_choice_whose_resumed_tokens_hold_its_stop_has_ended() -> None:
    entry = journal(resume=[1, 2, 3, 4], text=letters("cd"))
    assert entry.is_finished
    assert entry.take_untold_end() == Delta(choice_index=0, finish_reason=FinishReason.STOP)
    assert entry.take_untold_end() is None
    assert entry.num_completion_tokens == 4


def test_a_client_that_has_seen_the_end_is_not_told_again() -> None:
    entry = journal(resume=[1, 2, 3], finished=True, text=letters("cd"))
    assert entry.is_finished
    assert entry.take_untold_end() is None


def test_what_was_held_back_comes_with_the_end() -> None:
    entry = journal(text=letters("cd"))
    entry.submit("g:1")
    held = entry.accept(output(0, 1, 2))
    last = entry.accept(output(0, finish_reason=FinishReason.LENGTH))
    assert held is not None
    assert last is not None
    assert (held.text, last.text, last.finish_reason) == ("b", "c", FinishReason.LENGTH)
