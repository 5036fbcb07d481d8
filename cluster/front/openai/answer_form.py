"""What the answers of chat and of text completions have in common, so that one loop can send either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from msgspec import UNSET, UnsetType

from cluster.front.generate_call import Chunk
from cluster.front.openai.payloads import (
    Choice,
    FinishReason,
    Payload,
    PromptLogprobs,
    PromptTokenLogprob,
    UsagePayload,
)
from cluster.front.openai.token_texts import TokenTexts
from router import messages
from router.messages import TokenLogprobs

FINISH_REASONS: dict[messages.FinishReason | None, FinishReason | None] = {
    None: None,
    messages.FinishReason.STOP: "stop",
    messages.FinishReason.LENGTH: "length",
}

Piece = TypeVar("Piece", bound=Choice)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """What every message of one answer begins with. seed: None where prompts have different ones."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    seed: int | None

    def fields(self, *, with_seed: bool) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("id", "created", "model", "system_fingerprint")}
        return {**fields, "seed": self.seed} if with_seed and self.seed is not None else fields


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedPrompt:
    """One prompt of a request, as its answer needs it. text and token_ids: only where the answer shows them."""

    text: str = ""
    token_ids: Sequence[int] = ()


class AnswerForm(Protocol, Generic[Piece]):
    """A request's answer: pieces of choices, and the messages they go in. Keeps state: one for each request."""

    def pieces_of(self, prompt_index: int, chunk: Chunk) -> list[Piece]:
        """What the chunk brings the client; may be nothing yet."""
        ...

    def message(self, pieces: list[Piece], usage: UsagePayload | UnsetType | None, *, is_first: bool) -> Payload:
        """One message of a stream."""
        ...

    def whole(self, pieces: Sequence[Piece], usage: UsagePayload) -> Payload:
        """The answer at once; pieces: all of them."""
        ...


def by_index(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces of each choice, by the choices' indices."""
    found: dict[int, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.index, []).append(piece)
    return [found[index] for index in sorted(found)]


def choice_fields(pieces: Sequence[Choice]) -> dict[str, Any]:
    """Of a whole choice, from its pieces: what is the same in chats and texts."""
    token_ids = [piece.token_ids for piece in pieces if not isinstance(piece.token_ids, UnsetType)]
    return {
        "index": pieces[0].index,
        "degraded": True if any(piece.degraded is True for piece in pieces) else UNSET,
        "token_ids": [token_id for part in token_ids for token_id in part] if token_ids else UNSET,
    }


def prompt_logprobs(entries: Sequence[TokenLogprobs], tokens: TokenTexts) -> PromptLogprobs:
    """entries: for the prompt's second token and all after it."""
    rows: PromptLogprobs = [None]
    for entry in entries:
        ranked = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, 1)}
        own = {entry.token_id: (entry.logprob, None), **ranked}
        rows.append(
            {
                str(token_id): PromptTokenLogprob(logprob=logprob, rank=rank, decoded_token=tokens.text(token_id))
                for token_id, (logprob, rank) in own.items()
            }
        )
    return rows
