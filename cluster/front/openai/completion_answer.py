"""The answer of /v1/completions: the choices of all prompts, those of the first prompt first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import UNSET, UnsetType

from cluster.front.detokenizer import Detokenizer
from cluster.front.generate_call import Chunk
from cluster.front.openai.answer_form import (
    FINISH_REASONS,
    AnswerHead,
    AskedPrompt,
    by_index,
    choice_fields,
    prompt_logprobs,
)
from cluster.front.openai.completion_logprobs import LogprobColumns, joined
from cluster.front.openai.completion_request import CompletionRequest
from cluster.front.openai.payloads import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionChunkChoice,
    CompletionLogprobs,
    UsagePayload,
)
from cluster.front.openai.token_texts import TokenTexts
from router.messages import TokenLogprobs

NewDetokenizer = Callable[[], Detokenizer]


class PromptAnswer:
    """The choices of one prompt. Its first choice brings the prompt's log probabilities; where the others echo them,
    they wait for it."""

    def __init__(
        self,
        request: CompletionRequest,
        prompt: AskedPrompt,
        *,
        first_index: int,
        tokens: TokenTexts,
        new_detokenizer: NewDetokenizer,
    ) -> None:
        self._request = request
        self._prompt = prompt
        self._first_index = first_index
        self._tokens = tokens
        self._new_detokenizer = new_detokenizer
        self._shows_tokens = bool(request.logprobs is not None or request.return_token_ids)
        self._columns: dict[int, LogprobColumns] = {}
        self._begun: set[int] = set()
        self._held: list[Chunk] = []
        self._waits = bool(request.echo) and request.logprobs is not None
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs, ...]:
        return self._prompt_logprobs

    def pieces_of(self, chunk: Chunk) -> list[CompletionChunkChoice]:
        self._prompt_logprobs += chunk.delta.prompt_logprobs
        self._held.append(chunk)
        if self._waits and chunk.delta.choice_index != 0:
            return []
        self._waits = False
        held, self._held = self._held, []
        return [piece for chunk in held for piece in self._pieces_of(chunk)]

    def _pieces_of(self, chunk: Chunk) -> list[CompletionChunkChoice]:
        delta, wanted = chunk.delta, not self._request.is_echo_only
        is_first = delta.choice_index not in self._begun
        text = chunk.text if wanted else ""
        token_ids = list(delta.token_ids) if wanted else []
        if not (is_first or text or delta.finish_reason or (self._shows_tokens and token_ids)):
            return []
        self._begun.add(delta.choice_index)
        shows_ids = bool(self._request.return_token_ids)
        piece = CompletionChunkChoice(
            index=self._first_index + delta.choice_index,
            text=self._prompt.text + text if is_first and self._request.echo else text,
            logprobs=self._logprobs(delta.choice_index, delta.logprobs if wanted else (), is_first=is_first),
            finish_reason=FINISH_REASONS[delta.finish_reason],
            degraded=delta.degraded or UNSET,
            token_ids=token_ids if shows_ids else UNSET,
            prompt_token_ids=list(self._prompt.token_ids) if shows_ids and is_first else UNSET,
        )
        return [piece]

    def _logprobs(self, index: int, entries: Sequence[TokenLogprobs], *, is_first: bool) -> CompletionLogprobs | None:
        num_top = self._request.logprobs
        if num_top is None:
            return None
        if is_first:
            self._columns[index] = LogprobColumns(self._tokens, num_top=num_top, detokenizer=self._new_detokenizer())
        columns = self._columns[index]
        if not (is_first and self._request.echo):
            return columns.columns(entries)
        prompt = self._prompt
        echoed = columns.prompt_columns(prompt.text, prompt.token_ids, self._prompt_logprobs, self._new_detokenizer())
        return joined([echoed, columns.columns(entries)])


class CompletionAnswer:
    """See AnswerForm."""

    def __init__(
        self,
        request: CompletionRequest,
        *,
        head: AnswerHead,
        prompts: Sequence[AskedPrompt],
        tokens: TokenTexts,
        new_detokenizer: NewDetokenizer,
    ) -> None:
        self._request = request
        self._head = head
        self._tokens = tokens
        self._answers = [
            PromptAnswer(
                request,
                prompt,
                first_index=index * request.num_choices,
                tokens=tokens,
                new_detokenizer=new_detokenizer,
            )
            for index, prompt in enumerate(prompts)
        ]

    def pieces_of(self, prompt_index: int, chunk: Chunk) -> list[CompletionChunkChoice]:
        return self._answers[prompt_index].pieces_of(chunk)

    def message(
        self, pieces: list[CompletionChunkChoice], usage: UsagePayload | UnsetType | None, *, is_first: bool
    ) -> CompletionChunk:
        return CompletionChunk(**self._head.fields(with_seed=is_first), choices=pieces, usage=usage)

    def whole(self, pieces: Sequence[CompletionChunkChoice], usage: UsagePayload) -> Completion:
        choices = [self._whole_choice(parts) for parts in by_index(pieces)]
        return Completion(**self._head.fields(with_seed=True), choices=choices, usage=usage)

    def _whole_choice(self, pieces: Sequence[CompletionChunkChoice]) -> CompletionChoice:
        reason = pieces[-1].finish_reason
        assert reason is not None, "a generation that does not fail has an end"
        prompt_index, choice_index = divmod(pieces[0].index, self._request.num_choices)
        shows_prompt = self._request.prompt_logprobs is not None and choice_index == 0
        entries = self._answers[prompt_index].prompt_logprobs
        logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
        return CompletionChoice(
            **choice_fields(pieces),
            text="".join(piece.text for piece in pieces),
            logprobs=joined(logprobs) if logprobs else None,
            finish_reason=reason,
            prompt_logprobs=prompt_logprobs(entries, self._tokens) if shows_prompt else UNSET,
            prompt_token_ids=pieces[0].prompt_token_ids,
        )
