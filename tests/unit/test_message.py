from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts import message, opening
from experts.message import Header, Identity, Kind, MessageError, Refusal, request_header

MAX_ROWS = 1 << 16
SECRET = b"secret"

u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
identities = st.builds(
    Identity,
    epoch=u64,
    weights_version=u64,
    lane=u32,
    step=u64,
    layer=u32,
    micro_batch=u16,
    attempt=u16,
)
counts = st.dictionaries(u32, st.integers(1, 60), min_size=1, max_size=50).map(lambda rows: sorted(rows.items()))


@given(identities, counts)
def test_a_request_comes_out_as_it_went_in(identity: Identity, rows_per_expert: list[tuple[int, int]]) -> None:
    header = request_header(identity, rows_per_expert)
    encoded = message.encode_header(header)
    assert len(encoded) == message.HEADER_BYTES
    assert message.decode_header(encoded, max_rows=MAX_ROWS) == header
    encoded_rows = message.encode_rows_per_expert(rows_per_expert)
    assert len(encoded_rows) == message.rows_per_expert_bytes(header)
    assert message.decode_rows_per_expert(encoded_rows, header) == tuple(rows_per_expert)


@given(identities, counts, st.sampled_from(Refusal))
def test_answers_carry_the_requests_own_header(
    identity: Identity, rows_per_expert: list[tuple[int, int]], reason: Refusal
) -> None:
    header = request_header(identity, rows_per_expert)
    for answer in (header.reply(), header.refusal(reason)):
        again = message.decode_header(message.encode_header(answer), max_rows=MAX_ROWS)
        assert again == answer
        assert (again.identity, again.num_rows, again.num_slots) == (identity, header.num_rows, header.num_slots)


@given(st.binary(min_size=message.HEADER_BYTES, max_size=message.HEADER_BYTES))
def test_noise_is_never_taken_for_a_header(noise: bytes) -> None:
    with pytest.raises(MessageError):
        message.decode_header(noise, max_rows=MAX_ROWS)


@given(st.integers(0, message.HEADER_BYTES - 1), st.integers(0, 255), counts)
def test_a_header_with_any_byte_changed_is_refused_or_stays_within_bounds(
    position: int, value: int, rows_per_expert: list[tuple[int, int]]
) -> None:
    encoded = bytearray(message.encode_header(request_header(Identity(1, 2, 3, 4, 5, 6, 7), rows_per_expert)))
    encoded[position] = value
    try:
        header = message.decode_header(encoded, max_rows=MAX_ROWS)
    except MessageError:
        return
    assert 1 <= header.num_slots <= header.num_rows <= MAX_ROWS


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 10)), min_size=1, max_size=5))
def test_rows_per_expert_are_ascending_positive_and_complete_or_refused(rows: list[tuple[int, int]]) -> None:
    header = Header(kind=Kind.REQUEST, identity=Identity(1, 2, 3, 4, 5, 6, 7), num_slots=len(rows), num_rows=10)
    encoded = b"".join(struct.pack("<II", *pair) for pair in rows)
    try:
        decoded = message.decode_rows_per_expert(encoded, header)
    except MessageError:
        return
    assert decoded == tuple(sorted(dict(rows).items()))
    assert sum(count for _expert, count in decoded) == 10


TERMS = opening.LaneTerms(lane=5, hidden_size=5120, dtype="bfloat16", max_rows=1000)


def test_both_ends_of_an_opening_believe_each_other() -> None:
    challenge = opening.make_challenge(b"s" * 32)
    answer = opening.make_answer(challenge, secret=SECRET, nonce=b"r" * 32, shard_id="shard-1", lane_id="router-ä")
    assert len(challenge) == opening.CHALLENGE_BYTES
    assert len(answer) == opening.ANSWER_BYTES
    assert opening.check_answer(answer, challenge=challenge, secret=SECRET, shard_id="shard-1") == "router-ä"
    welcome = opening.make_welcome(TERMS, challenge=challenge, answer=answer, secret=SECRET)
    assert len(welcome) == opening.WELCOME_BYTES
    assert opening.check_welcome(welcome, challenge=challenge, answer=answer, secret=SECRET) == TERMS


@given(st.data())
def test_an_opening_with_any_bit_changed_is_refused(data: st.DataObject) -> None:
    challenge = opening.make_challenge(b"s" * 32)
    answer = opening.make_answer(challenge, secret=SECRET, nonce=b"r" * 32, shard_id="shard-1", lane_id="lane")
    welcome = opening.make_welcome(TERMS, challenge=challenge, answer=answer, secret=SECRET)
    with pytest.raises(opening.OpeningError):
        opening.check_answer(_flipped(answer, data), challenge=challenge, secret=SECRET, shard_id="shard-1")
    with pytest.raises(opening.OpeningError):
        opening.check_welcome(_flipped(welcome, data), challenge=challenge, answer=answer, secret=SECRET)


def _flipped(encoded: bytes, data: st.DataObject) -> bytes:
    bit = data.draw(st.integers(0, len(encoded) * 8 - 1))
    changed = bytearray(encoded)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_routers_proof_does_not_serve_as_a_shards() -> None:
    challenge = opening.make_challenge(b"s" * 32)
    answer = opening.make_answer(challenge, secret=SECRET, nonce=b"r" * 32, shard_id="shard-1", lane_id="lane")
    welcome = opening.make_welcome(TERMS, challenge=challenge, answer=answer, secret=SECRET)
    with pytest.raises(opening.OpeningError, match="proof"):
        opening.check_welcome(welcome[:-32] + answer[-32:], challenge=challenge, answer=answer, secret=SECRET)


@pytest.mark.parametrize("shard_id", ["", "x" * 97, "a\0b"])
def test_an_id_that_does_not_fit_is_the_callers_mistake(shard_id: str) -> None:
    with pytest.raises(ValueError, match="shard_id must be 1 to 96 bytes"):
        opening.make_answer(
            opening.make_challenge(b"s" * 32), secret=SECRET, nonce=bytes(32), shard_id=shard_id, lane_id="lane"
        )
