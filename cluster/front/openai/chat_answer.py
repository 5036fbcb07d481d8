"""The answer of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from cluster.front.generate_call import Chunk
from cluster.front.openai.answer_form import (
    FINISH_REASONS,
    AnswerHead,
    AskedPrompt,
    by_index,
    choice_fields,
    prompt_logprobs,
)
from cluster.front.openai.chat_request import ChatRequest
from cluster.front.openai.payloads import (
    AnswerMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    TokenLogprob,
    TopLogprob,
    UsagePayload,
)
from cluster.front.openai.token_texts import TokenTexts, most_likely
from router.messages import TokenLogprobs


class ChatAnswer:
    """See AnswerForm."""

    def __init__(self, request: ChatRequest, *, head: AnswerHead, prompt: AskedPrompt, tokens: TokenTexts) -> None:
        self._request = request
        self._head = head
        self._tokens = tokens
        self._prompt_token_ids = list(prompt.token_ids) if request.return_token_ids else UNSET
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self._shows_tokens = bool(request.logprobs or request.return_token_ids)
        self._begun: set[int] = set()

    def pieces_of(self, prompt_index: int, chunk: Chunk) -> list[ChatChunkChoice]:
        delta = chunk.delta
        self._prompt_logprobs += delta.prompt_logprobs
        is_first = delta.choice_index not in self._begun
        if not (is_first or chunk.text or delta.finish_reason or (self._shows_tokens and delta.token_ids)):
            return []
        self._begun.add(delta.choice_index)
        piece = ChatChunkChoice(
            index=delta.choice_index,
            delta=ChatDelta(role="assistant" if is_first else UNSET, content=chunk.text),
            logprobs=self._logprobs(delta.logprobs),
            finish_reason=FINISH_REASONS[delta.finish_reason],
            degraded=delta.degraded or UNSET,
            token_ids=list(delta.token_ids) if self._request.return_token_ids else UNSET,
        )
        return [piece]

    def message(
        self, pieces: list[ChatChunkChoice], usage: UsagePayload | UnsetType | None, *, is_first: bool
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            **self._head.fields(with_seed=is_first),
            choices=pieces,
            usage=usage,
            prompt_token_ids=self._prompt_token_ids if is_first else UNSET,
        )

    def whole(self, pieces: Sequence[ChatChunkChoice], usage: UsagePayload) -> ChatCompletion:
        asked = self._request.prompt_logprobs is not None
        return ChatCompletion(
            **self._head.fields(with_seed=True),
            choices=[_whole_choice(parts) for parts in by_index(pieces)],
            usage=usage,
            prompt_logprobs=prompt_logprobs(self._prompt_logprobs, self._tokens) if asked else UNSET,
            prompt_token_ids=self._prompt_token_ids,
        )

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> ChatLogprobs | None:
        if not self._request.logprobs:
            return None
        return ChatLogprobs(content=[self._token_logprob(entry) for entry in entries])

    def _token_logprob(self, entry: TokenLogprobs) -> TokenLogprob:
        top = most_likely(entry, self._request.top_logprobs or 0)
        own = self._top_logprob(entry.token_id, entry.logprob)
        return TokenLogprob(
            token=own.token,
            logprob=own.logprob,
            bytes=own.bytes,
            top_logprobs=[self._top_logprob(token_id, logprob) for token_id, logprob in top],
        )

    def _top_logprob(self, token_id: int, logprob: float) -> TopLogprob:
        text, data = self._tokens.text_and_bytes(token_id)
        return TopLogprob(token=text, logprob=logprob, bytes=data)


def _whole_choice(pieces: Sequence[ChatChunkChoice]) -> ChatChoice:
    reason = pieces[-1].finish_reason
    assert reason is not None, "a generation that does not fail has an end"
    logprobs = [entry for piece in pieces if piece.logprobs is not None for entry in piece.logprobs.content]
    return ChatChoice(
        **choice_fields(pieces),
        message=AnswerMessage(role="assistant", content="".join(piece.delta.content for piece in pieces)),
        logprobs=None if pieces[0].logprobs is None else ChatLogprobs(content=logprobs),
        finish_reason=reason,
    )
