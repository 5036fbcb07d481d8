"""The gateway's memory of an open request: enough to submit it again, to any router, at any moment.

A choice's output is a function of its prompt, parameters, seed and the tokens so far; all four are here. What a
router sends under an old attempt is dropped, so a token is passed on once whatever became of its router.

    submit() -> attempt 0 --tokens--> accept() ... router lost
    submit() -> attempt 1, all tokens so far as resume_ids --tokens--> accept() ...
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cluster.front.choice_text import ChoiceText
from router.messages import FinishReason, GenerateRequest, MissingExpertPolicy, SequenceOutput, TokenLogprobs
from router.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """News of one choice, since its previous Delta. text is what the tokens complete; prompt_logprobs are whole or
    absent."""

    choice_index: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    degraded: bool = False

    def followed_by(self, later: Delta) -> Delta:
        """Both as one. Raises ValueError when they are of different choices."""
        if later.choice_index != self.choice_index:
            raise ValueError(f"choice_index {later.choice_index} cannot follow {self.choice_index}")
        return Delta(
            choice_index=self.choice_index,
            token_ids=self.token_ids + later.token_ids,
            text=self.text + later.text,
            logprobs=self.logprobs + later.logprobs,
            prompt_logprobs=self.prompt_logprobs + later.prompt_logprobs,
            finish_reason=later.finish_reason,
            degraded=self.degraded or later.degraded,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoicePlan:
    """What one choice is asked to be. engine_id names it among routers and is never used for anything else.

    resume_ids: output tokens the client already holds. already_finished: the client holds its end, too.
    """

    engine_id: str
    prompt_ids: list[int]
    params: SamplingParams
    resume_ids: list[int] = field(default_factory=list)
    already_finished: bool = False
    cache_salt: str = ""
    on_missing_expert: MissingExpertPolicy | None = None


class ChoiceJournal:
    """One choice: what was asked, what has come, and the attempt that may still bring more. It alone decides that the
    choice has ended: by the router's word, or because its text has come to a stop string, of which routers know
    nothing."""

    def __init__(self, plan: ChoicePlan, text: ChoiceText) -> None:
        """text: new; it is given the tokens that the client already holds."""
        self._plan = plan
        self._text = text
        self._token_ids = list(plan.resume_ids)
        self._has_untold_end = text.push(plan.resume_ids).is_stopped and not plan.already_finished
        self._attempt = -1
        self.weights_version = 0
        """Bound before the first attempt, for life."""
        self._prompt_logprobs_sent = bool(plan.resume_ids)
        self._degraded = False
        self._is_finished = plan.already_finished or self._has_untold_end
        self.num_cached_tokens = 0

    @property
    def choice_index(self) -> int:
        return self._plan.params.choice_index

    @property
    def engine_id(self) -> str:
        return self._plan.engine_id

    @property
    def attempt(self) -> int:
        """Of the latest submission, from 0; -1 before the first."""
        return self._attempt

    @property
    def num_completion_tokens(self) -> int:
        return len(self._token_ids)

    @property
    def is_finished(self) -> bool:
        return self._is_finished

    def take_untold_end(self) -> Delta | None:
        """The end of a choice that the client's own tokens bring to a stop string. Once."""
        is_untold, self._has_untold_end = self._has_untold_end, False
        return Delta(choice_index=self.choice_index, finish_reason=FinishReason.STOP) if is_untold else None

    def submit(self, return_address: str) -> GenerateRequest:
        """The next attempt, with everything that has come so far."""
        self._attempt += 1
        params = self._plan.params
        if self._prompt_logprobs_sent:
            params = replace(params, num_prompt_logprobs=None)
        return GenerateRequest(
            request_id=self._plan.engine_id,
            attempt=self._attempt,
            prompt_ids=self._plan.prompt_ids,
            resume_ids=list(self._token_ids),
            params=params,
            cache_salt=self._plan.cache_salt,
            return_address=return_address,
            weights_version=self.weights_version,
            on_missing_expert=self._plan.on_missing_expert,
        )

    def accept(self, output: SequenceOutput) -> Delta | None:
        """None for a late output of an old attempt, or of a finished choice. Must not be called with an error."""
        if output.attempt != self._attempt or self.is_finished:
            return None
        prompt_logprobs = self._take_prompt_logprobs(output)
        read = self._text.push(output.token_ids, is_last=output.finish_reason is not None)
        token_ids = output.token_ids[: read.num_tokens]
        finish_reason = FinishReason.STOP if read.is_stopped else output.finish_reason
        self._token_ids.extend(token_ids)
        self._degraded |= output.degraded
        if self._attempt == 0:
            self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self._is_finished = finish_reason is not None
        return Delta(
            choice_index=self.choice_index,
            token_ids=tuple(token_ids),
            text=read.text,
            logprobs=tuple(output.logprobs or ())[: read.num_tokens],
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish_reason,
            degraded=self._degraded,
        )

    def _take_prompt_logprobs(self, output: SequenceOutput) -> tuple[TokenLogprobs, ...]:
        if output.prompt_logprobs is None:
            return ()
        self._prompt_logprobs_sent = True
        return tuple(entry for entry in output.prompt_logprobs if entry is not None)
