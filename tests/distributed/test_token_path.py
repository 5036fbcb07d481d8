"""Both ends of the token path over real sockets, without an engine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
from engine_harness import SECRET, listening, wait_until, wait_until_async

from cluster.front.token_stream import StreamBrokenError
from experts.opening import ANSWER_BYTES
from router.messages import Abort, FinishReason, RequestAttempt, SequenceOutput, TokenBatch, encode
from router.token_link import LinkLimits
from router.token_links import TokenLinks
from router.token_opening import LENGTH, MAX_ABORT_BYTES, MAX_BATCH_BYTES, frame, make_challenge, make_welcome

LIMITS = LinkLimits(connect_timeout_s=1.0, stall_timeout_s=0.3, max_backlog_bytes=1 << 20)


@pytest.fixture
def links() -> Iterator[TokenLinks]:
    made = TokenLinks(router_id="router-a", secret=SECRET, limits=LIMITS, max_batch_bytes=1 << 16)
    yield made
    made.close(1.0)


def _output(request_id: str, *token_ids: int, attempt: int = 0) -> SequenceOutput:
    return SequenceOutput(request_id=request_id, attempt=attempt, token_ids=list(token_ids))


class SilentGateway:
    """Opens the connection as it should, says what it is told to, and then reads nothing."""

    def __init__(self, says: bytes = b"") -> None:
        self._says = says
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Possibly in the middle of an opening."""
        self._socket.close()
        for connection in self._connections:
            connection.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            connection, _peer = self._socket.accept()
            self._connections.append(connection)
            challenge = make_challenge()
            connection.sendall(challenge)
            answer = connection.recv(ANSWER_BYTES, socket.MSG_WAITALL)
            connection.sendall(make_welcome(challenge=challenge, answer=answer, secret=SECRET) + self._says)


def test_outputs_of_many_steps_arrive_whole_and_in_order(links: TokenLinks) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            with listener.open("a", 0) as a, listener.open("b", 0) as b:
                links.open(listener.address)
                for step in range(1000):
                    assert links.send(listener.address, [_output("a", step), _output("b", -step)]) == []
                received: dict[str, list[int]] = {"a": [], "b": []}
                while len(received["a"]) < 1000 or len(received["b"]) < 1000:
                    links.poll()
                    for name, stream in (("a", a), ("b", b)):
                        if len(received[name]) < 1000:
                            received[name] += (await asyncio.wait_for(_take(links, stream), 10)).token_ids
                assert received == {"a": list(range(1000)), "b": [-step for step in range(1000)]}
                assert listener.num_connections == 1

    async def _take(links: TokenLinks, stream: object) -> SequenceOutput:
        pending = asyncio.ensure_future(anext(stream))  # type: ignore[call-overload]
        while not pending.done():
            links.poll()
            await asyncio.sleep(0.001)
        result: SequenceOutput = pending.result()
        return result

    asyncio.run(scenario())


def test_late_outputs_of_an_old_attempt_are_dropped_and_counted(links: TokenLinks) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            with listener.open("a", 1) as stream:
                links.open(listener.address)
                links.send(listener.address, [_output("a", 1, attempt=0)])
                links.send(listener.address, [_output("a", 2, attempt=1)])
                while listener.num_late_outputs == 0:
                    links.poll()
                    await asyncio.sleep(0.001)
                assert (await anext(stream)).token_ids == [2]
            assert listener.num_streams == 0

    asyncio.run(scenario())


def test_outputs_that_nobody_waits_for_are_answered_with_one_abort_for_each_attempt(links: TokenLinks) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            links.open(listener.address)
            for _ in range(100):
                links.send(listener.address, [_output("a", 1), _output("a", 1, attempt=1), _output("b", 1)])
            while listener.num_late_outputs < 300:
                links.poll()
                await asyncio.sleep(0.001)
            # Answered after all of these: nothing more is on its way.
            links.tell_begun(listener.address, [RequestAttempt(request_id="last", attempt=0)])
            heard: list[tuple[str, Abort]] = []
            while not heard or heard[-1][1].request_id != "last":
                links.poll()
                heard += links.take_aborts()
                await asyncio.sleep(0.001)
            assert {address for address, _ in heard} == {listener.address}
            assert [(abort.request_id, abort.attempt) for _, abort in heard] == [
                ("a", 0),
                ("a", 1),
                ("b", 0),
                ("last", 0),
            ]

    asyncio.run(scenario())


def test_the_last_output_of_a_request_that_nobody_waits_for_needs_no_abort(links: TokenLinks) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            links.open(listener.address)
            last = SequenceOutput(request_id="a", attempt=0, finish_reason=FinishReason.LENGTH)
            links.send(listener.address, [last])
            links.tell_begun(listener.address, [RequestAttempt(request_id="b", attempt=0)])
            heard: list[tuple[str, Abort]] = []
            while not heard:
                links.poll()
                heard += links.take_aborts()
                await asyncio.sleep(0.001)
            assert [abort.request_id for _, abort in heard] == ["b"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (LENGTH.pack(MAX_ABORT_BYTES + 1), f"an abort of {MAX_ABORT_BYTES + 1} bytes, the limit is {MAX_ABORT_BYTES}"),
        (frame(b"abc"), "says what is no abort"),
    ],
)
def test_a_gateway_that_talks_nonsense_is_lost(links: TokenLinks, says: bytes, reason: str) -> None:
    gateway = SilentGateway(says)
    links.open(gateway.address)
    lost: dict[str, str] = {}
    wait_until(lambda: bool(lost.update(links.poll()) or lost))
    assert reason in lost[gateway.address]
    assert links.take_aborts() == []
    gateway.close()


def test_a_router_that_leaves_its_aborts_unread_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.front.router_connection.MAX_UNREAD_BYTES", 1 << 16)

    async def scenario() -> None:
        async with listening() as listener:
            link = TokenLinks(router_id="router-a", secret=SECRET)
            link.open(listener.address)
            # It never polls, so it sends from the opening thread's connection alone: by hand.
            await wait_until_async(lambda: link._links[listener.address]._socket is not None)
            sock = link._links[listener.address]._socket
            assert sock is not None
            number = 0
            while listener.num_connections:
                begun = [RequestAttempt(request_id=f"{number}/{index}" + 200 * "x", attempt=0) for index in range(100)]
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    sock.setblocking(True)
                    await asyncio.to_thread(sock.sendall, frame(encode(TokenBatch(router_id="router-a", begun=begun))))
                number += 1
            assert number > 1
            link.close(0.0)

    asyncio.run(scenario())


def test_only_streams_that_a_router_fed_break_with_its_connection() -> None:
    async def scenario() -> None:
        async with listening() as listener:
            ends = [TokenLinks(router_id=f"router-{name}", secret=SECRET) for name in "ab"]
            with listener.open("a", 0) as a, listener.open("b", 0) as b:
                for end, name in zip(ends, "ab", strict=True):
                    end.open(listener.address)
                    end.send(listener.address, [_output(name, 1)])
                    while listener.num_connections == 0 or end.have_backlog:
                        end.poll()
                        await asyncio.sleep(0.001)
                assert (await anext(a)).token_ids == [1]
                assert (await anext(b)).token_ids == [1]
                ends[0].close(1.0)
                with pytest.raises(StreamBrokenError, match="router-a was lost"):
                    await asyncio.wait_for(anext(a), 5)
                ends[1].send(listener.address, [_output("b", 2)])
                assert (await anext(b)).token_ids == [2]
                ends[1].close(1.0)

    asyncio.run(scenario())


def test_an_output_larger_than_a_gateway_takes_is_handed_back_and_its_neighbours_go(links: TokenLinks) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            with listener.open("small", 0) as stream:
                links.open(listener.address)
                huge = _output("huge", *range(100_000))
                assert links.send(listener.address, [_output("small", 1), huge, _output("small", 2)]) == [huge]
                while links.have_backlog:
                    links.poll()
                    await asyncio.sleep(0.001)
                assert (await anext(stream)).token_ids[0] == 1

    asyncio.run(scenario())


def test_a_gateway_that_reads_nothing_is_lost_by_its_backlog() -> None:
    # However slow the test is, the clock must not be first.
    patient = LinkLimits(stall_timeout_s=600.0, max_backlog_bytes=1 << 20)
    links = TokenLinks(router_id="router-a", secret=SECRET, limits=patient)
    gateway = SilentGateway()
    links.open(gateway.address)
    lost: dict[str, str] = {}

    def is_lost() -> bool:
        if links.addresses:
            links.send(gateway.address, [_output("a", *range(10_000))])
        lost.update(links.poll())
        return bool(lost)

    wait_until(is_lost)
    assert "does not read its tokens" in lost[gateway.address]
    assert links.addresses == ()
    gateway.close()


def test_a_gateway_is_not_too_slow_for_having_a_whole_batch_before_it() -> None:
    links = TokenLinks(router_id="router-a", secret=SECRET)
    gateway = SilentGateway()
    links.open(gateway.address)
    large = SequenceOutput(request_id="a", attempt=0, error="x" * (MAX_BATCH_BYTES - 1000))
    assert links.send(gateway.address, [large]) == []
    assert links.send(gateway.address, [_output("a", 2)]) == []
    assert links.poll() == {}
    gateway.close()
    links.close(0.0)


def test_a_gateway_that_stops_reading_is_lost_by_the_clock(links: TokenLinks) -> None:
    gateway = SilentGateway()
    links.open(gateway.address)
    lost: dict[str, str] = {}

    def is_lost() -> bool:
        # Never more than one batch waits, so it cannot be the backlog that is too large.
        for _ in range(100):
            if links.addresses and not links.have_backlog:
                links.send(gateway.address, [_output("a", *range(10_000))])
        lost.update(links.poll())
        return bool(lost)

    wait_until(is_lost)
    assert "has read nothing for 0.3 s" in lost[gateway.address]
    gateway.close()


def test_a_gateway_that_nobody_listens_for_is_lost(links: TokenLinks) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    links.open(address)
    links.send(address, [_output("a", 1)])
    lost: dict[str, str] = {}
    wait_until(lambda: bool(lost.update(links.poll()) or lost))
    assert "could not be reached" in lost[address]


def test_a_gateway_whose_address_cannot_be_looked_up_is_lost(links: TokenLinks) -> None:
    links.open("no..host:5000")
    wait_until(lambda: "could not be reached" in links.poll().get("no..host:5000", ""))


def test_a_gateway_that_says_nothing_is_lost_by_the_deadline_of_its_opening(links: TokenLinks) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        links.open(address)
        lost: dict[str, str] = {}
        wait_until(lambda: bool(lost.update(links.poll()) or lost), timeout_s=3)
        assert "timed out" in lost[address]


def test_an_impostor_gateway_gets_no_tokens(links: TokenLinks) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        links.open(address)
        links.send(address, [_output("a", 1)])
        connection, _peer = server.accept()
        with connection:
            challenge = make_challenge()
            connection.sendall(challenge)
            answer = connection.recv(ANSWER_BYTES, socket.MSG_WAITALL)
            connection.sendall(make_welcome(challenge=challenge, answer=answer, secret=b"guessed"))
            lost: dict[str, str] = {}
            wait_until(lambda: bool(lost.update(links.poll()) or lost))
            assert "does not fit this cluster's secret" in lost[address]
            assert connection.recv(1) == b"", "hung up without a token"


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:0", "host:65536", "host:http"])
def test_an_address_that_is_none_is_named(links: TokenLinks, address: str) -> None:
    with pytest.raises(ValueError, match=f"return_address must be host:port, not '{address}'"):
        links.open(address)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"GET / HTTP/1.1\r\n".ljust(ANSWER_BYTES, b" "), id="another protocol"),
        pytest.param(b"\0" * ANSWER_BYTES, id="zeros"),
    ],
)
def test_a_stranger_is_refused_before_anything_it_says_is_believed(sent: bytes) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            host, port = listener.address.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(sent + LENGTH.pack(2**32 - 1))
            await asyncio.wait_for(reader.read(), 5)
            await wait_until_async(lambda: listener.num_refused == 1)
            await wait_until_async(lambda: listener.num_connections == 0)
            writer.close()

    asyncio.run(scenario())


def test_a_router_that_announces_too_much_or_talks_nonsense_is_refused() -> None:
    async def scenario() -> None:
        async with listening() as listener:
            cut_short = encode(TokenBatch(router_id="router-a"))[:-1]
            for message in (LENGTH.pack(2**32 - 1), frame(b"abc"), frame(cut_short)):
                before = listener.num_refused
                link = TokenLinks(router_id="router-a", secret=SECRET)
                link.open(listener.address)
                await wait_until_async(lambda: listener.num_connections == 1)
                link._links[listener.address]._backlog.append(memoryview(message))
                while listener.num_refused == before:
                    link.poll()
                    await asyncio.sleep(0.001)
                link.close(0.1)
                await wait_until_async(lambda: listener.num_connections == 0)

    asyncio.run(scenario())


def test_closing_a_listener_breaks_its_streams() -> None:
    async def scenario() -> None:
        async with listening() as listener:
            stream = listener.open("a", 0)
        with pytest.raises(StreamBrokenError, match="closing"):
            await anext(stream)
        stream.close()
        stream.close()
        assert listener.num_streams == 0

    asyncio.run(scenario())


def test_an_attempt_has_one_stream() -> None:
    async def scenario() -> None:
        async with listening() as listener:
            with listener.open("a", 0), pytest.raises(ValueError, match="'a' attempt 0 has a stream already"):
                listener.open("a", 0)
            with listener.open("a", 0):
                pass

    asyncio.run(scenario())
