"""Aborts out of bytes, however the network cuts them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.abort_reader import AbortReader
from router.messages import Abort, TokenBatch, encode
from router.token_opening import LENGTH, MAX_ABORT_BYTES, frame

aborts = st.lists(st.builds(Abort, request_id=st.text(max_size=20), attempt=st.integers(0, 9)), max_size=5)


@given(sent=aborts, size=st.integers(1, 80))
def test_every_abort_comes_once_and_in_order(sent: list[Abort], size: int) -> None:
    data = b"".join(frame(encode(abort)) for abort in sent)
    reader = AbortReader()
    heard = [abort for begin in range(0, len(data), size) for abort in reader.feed(data[begin : begin + size])]
    assert heard == sent


def test_the_longest_name_a_client_may_choose_fits() -> None:
    abort = Abort(request_id="🦙" * 256 + "/01234567/63", attempt=2**31)
    assert AbortReader().feed(frame(encode(abort))) == [abort]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (LENGTH.pack(MAX_ABORT_BYTES + 1), f"an abort of {MAX_ABORT_BYTES + 1} bytes"),
        (LENGTH.pack(2**32 - 1), f"an abort of {2**32 - 1} bytes"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "an abort of"),
        (frame(b""), "truncated"),
        (frame(encode(Abort(request_id="a", attempt=0))[:-1]), "truncated"),
        (frame(b"abc"), "Expected `object`"),
        (frame(encode(TokenBatch(router_id="r"))), "missing required field"),
    ],
)
def test_what_is_no_abort_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        AbortReader().feed(data)
