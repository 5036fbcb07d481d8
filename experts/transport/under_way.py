"""The requests of a link that have left and were not answered yet, and what comes back for them.

An answer carries its request's own header. So the header of the reply is known before it comes: what equals it byte
for byte is right in every field. Everything else is looked at field by field.
"""

from __future__ import annotations

from dataclasses import dataclass

from experts.message import Header, Kind, MessageError, decode_header, reply_header
from experts.transport.base import LinkRequest


@dataclass(slots=True, eq=False)
class Sent:
    """request is None once it was abandoned: its answer is still to come. first_row, rows_at: where it lies in a
    region, and the offset of its rows there."""

    request: LinkRequest | None
    first_row: int = 0
    rows_at: int = 0


class UnderWay:
    """By the header of the reply that each waits for."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._sent: dict[bytes, Sent] = {}

    def __len__(self) -> int:
        return len(self._sent)

    def add(self, encoded_request: bytes, sent: Sent) -> None:
        self._sent[reply_header(encoded_request)] = sent

    def abandon(self, request: LinkRequest) -> None:
        for sent in self._sent.values():
            if sent.request is request:
                sent.request = None

    def waiting_for(self, reply: bytes) -> Sent | None:
        """The request of exactly this reply; None for any other message."""
        return self._sent.get(reply)

    def done(self, reply: bytes) -> None:
        del self._sent[reply]

    def judge(self, answer: bytes) -> Header:
        """The header of an answer that ``waiting_for`` does not know, or whose request was abandoned: a refusal, or
        a late reply. Raises MessageError for anything else, naming the field."""
        header = decode_header(answer, max_rows=self._max_rows)
        if header.kind is Kind.REQUEST:
            raise MessageError("a shard sent a request")
        if header.kind is Kind.REPLY and answer not in self._sent:
            for reply in self._sent:
                request = decode_header(reply, max_rows=self._max_rows)
                if request.identity == header.identity:
                    raise MessageError(f"the reply has {header.num_rows} rows, the request had {request.num_rows}")
        return header

    def take_out(self, header: Header, answer: bytes) -> Sent | None:
        """The request of a judged answer, no longer under way; None if there is none (any more)."""
        sent = self._sent.pop(reply_header(answer), None)
        if sent is not None and sent.request is not None:
            sent.request.refusal = header.reason
        return sent
