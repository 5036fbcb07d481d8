"""What gathers between a router and a slow client."""

from __future__ import annotations

import asyncio

import pytest

from cluster.front.token_stream import StreamBrokenError, TokenStream, merge_outputs
from router.messages import ErrorCode, FinishReason, SequenceOutput, TokenLogprobs


class Connection:
    """Of a router."""

    router_id = "router-a"

    def __init__(self) -> None:
        self.aborted: list[tuple[str, int]] = []

    def abort(self, request_id: str, attempt: int) -> None:
        self.aborted.append((request_id, attempt))


CONNECTION = Connection()


def _output(*token_ids: int, **fields: object) -> SequenceOutput:
    return SequenceOutput(request_id="a", attempt=0, token_ids=list(token_ids), **fields)  # type: ignore[arg-type]


def _stream() -> TokenStream:
    return TokenStream(request_id="a", attempt=0, on_close=lambda: None)


def test_a_slow_consumer_gets_longer_items_not_more() -> None:
    async def scenario() -> None:
        stream = _stream()
        for token in (1, 2, 3):
            stream.put(_output(token), CONNECTION)
        assert (await anext(stream)).token_ids == [1, 2, 3]
        stream.put(_output(4), CONNECTION)
        stream.put(_output(5, finish_reason=FinishReason.STOP), CONNECTION)
        last = await anext(stream)
        assert (last.token_ids, last.finish_reason) == ([4, 5], FinishReason.STOP)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(scenario())


def test_a_waiting_consumer_is_woken() -> None:
    async def scenario() -> None:
        stream = _stream()
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        assert not waiting.done()
        stream.put(_output(1), CONNECTION)
        assert (await waiting).token_ids == [1]

    asyncio.run(scenario())


def test_a_broken_stream_gives_what_had_come_first() -> None:
    async def scenario() -> None:
        stream = _stream()
        stream.put(_output(1), CONNECTION)
        stream.fail("the router is gone")
        stream.fail("a later reason")
        assert (await anext(stream)).token_ids == [1]
        with pytest.raises(StreamBrokenError, match="the router is gone"):
            await anext(stream)

    asyncio.run(scenario())


def test_a_finished_stream_cannot_break() -> None:
    async def scenario() -> None:
        stream = _stream()
        stream.put(_output(1, finish_reason=FinishReason.LENGTH), CONNECTION)
        stream.fail("the router is gone")
        assert [output.token_ids async for output in stream] == [[1]]

    asyncio.run(scenario())


def test_closing_a_stream_before_its_end_aborts_it_where_it_comes_from() -> None:
    async def scenario() -> None:
        connection = Connection()
        stream = _stream()
        stream.put(_output(1), connection)
        stream.close()
        assert connection.aborted == [("a", 0)]

    asyncio.run(scenario())


def test_closing_a_stream_at_its_end_aborts_nothing() -> None:
    async def scenario() -> None:
        connection = Connection()
        stream = _stream()
        stream.put(_output(1, finish_reason=FinishReason.LENGTH), connection)
        stream.close()
        assert connection.aborted == []

    asyncio.run(scenario())


def test_merging_keeps_every_field() -> None:
    one, two = TokenLogprobs(token_id=1, logprob=-1.0), TokenLogprobs(token_id=2, logprob=-2.0)
    merged = merge_outputs(
        [
            _output(prompt_logprobs=[None, one], num_cached_tokens=16),
            _output(1, logprobs=[one], degraded=True),
            _output(2, logprobs=[two]),
            _output(finish_reason=FinishReason.ERROR, error="lost", error_code=ErrorCode.UNAVAILABLE),
        ]
    )
    assert merged == SequenceOutput(
        request_id="a",
        attempt=0,
        token_ids=[1, 2],
        logprobs=[one, two],
        prompt_logprobs=[None, one],
        finish_reason=FinishReason.ERROR,
        error="lost",
        error_code=ErrorCode.UNAVAILABLE,
        degraded=True,
        num_cached_tokens=16,
    )


def test_merging_leaves_out_logprobs_that_nobody_asked_for() -> None:
    assert merge_outputs([_output(1), _output(2)]).logprobs is None
