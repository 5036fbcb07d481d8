"""The requests of a link that have left and were not answered yet, and what comes back for them.

An answer carries its request's own header. So the header of the reply is known before it comes: what equals it byte
for byte is right in every field. Everything else is looked at field by field.
"""

from __future__ import annotations

from experts.message import Header, Kind, MessageError, decode_header, reply_header
from experts.transport.base import LinkRequest


class UnderWay:
    """By the header of the reply that each waits for."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._requests: dict[bytes, LinkRequest] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: LinkRequest) -> None:
        self._requests[reply_header(request.header)] = request

    def get(self, reply: bytes) -> LinkRequest | None:
        """The request of exactly this reply; None for any other message."""
        return self._requests.get(reply)

    def pop(self, reply: bytes) -> LinkRequest | None:
        return self._requests.pop(reply, None)

    def judge(self, answer: bytes) -> Header:
        """The header of an answer that ``get`` does not know, or whose request was abandoned: a refusal, or a late
        reply. Raises MessageError for anything else, naming the field."""
        header = decode_header(answer, max_rows=self._max_rows)
        if header.kind is Kind.REQUEST:
            raise MessageError("a shard sent a request")
        if header.kind is Kind.REPLY and answer not in self._requests:
            for reply in self._requests:
                request = decode_header(reply, max_rows=self._max_rows)
                if request.identity == header.identity:
                    raise MessageError(f"the reply has {header.num_rows} rows, the request had {request.num_rows}")
        return header

    def take_out(self, header: Header, answer: bytes) -> LinkRequest | None:
        """The request of a judged answer, no longer under way; None if there is none."""
        request = self._requests.pop(reply_header(answer), None)
        if request is not None:
            request.refusal = header.reason
        return request
