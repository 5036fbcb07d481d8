"""The service loop of a shard: one thread, many lanes of either transport.

It reads whatever has arrived, computes one tile, sends what is ready, and looks again. It never blocks on a
router: results overwrite the rows they answer and leave as the router takes them. A lane that breaks the protocol
is closed and counted; the others do not notice.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import Counter
from enum import IntEnum
from functools import partial

import torch

from experts.doors import Doors
from experts.epoch import ShardAddress
from experts.message import Header, MessageError, Refusal, RowsPerExpert
from experts.server_limits import ServerLimits, ServerStats
from experts.shard import Shard
from experts.shard_work import ShardWork
from experts.transport.base import LaneEnd, LinkError, Listener
from experts.transport.host_id import host_id
from experts.transport.rules import LaneRules
from experts.transport.shm_listener import ShmListener
from experts.transport.tcp_listener import TcpListener
from experts.transport.waiting import NEWS, READ, WRITE, WaitPolicy, make_poller

_LOG = logging.getLogger(__name__)

# The longest sleep: openings that take too long are noticed in this time.
_IDLE_S = 1.0
# How often routers that wait for rows hear that work goes on; well below any lane's silence_s.
_PULSE_S = 0.2


class _Closing(IntEnum):
    """How far the server is on its way out; only grows."""

    NO = 0
    DRAINING = 1
    STOPPING = 2


class ShardServer:
    """Serves a shard's lanes on ``host:port`` from a thread of its own. Start it once, then drain or stop it."""

    def __init__(
        self,
        shard: Shard,
        *,
        secret: bytes,
        host: str = "127.0.0.1",
        port: int = 0,
        num_threads: int = 1,
        limits: ServerLimits | None = None,
        wait: WaitPolicy | None = None,
    ) -> None:
        """Binds the port (0: the system chooses). num_threads: of one matmul. wait: None is what suits the host.

        Raises ValueError for an empty secret, OSError if the port cannot be had.
        """
        if not secret:
            raise ValueError("secret is empty: a lane must be able to prove itself")
        self._shard = shard
        self._limits = limits or ServerLimits()
        self._num_threads = num_threads
        rules = self._rules(secret)
        self._tcp = TcpListener(host, port, rules)
        self._shm = ShmListener(rules) if host_id() is not None else None
        self._poller = make_poller(wait)
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name=f"shard-{shard.shard_id}", daemon=True)
        self._closing = _Closing.NO
        self._drain_deadline = 0.0
        # What follows belongs to the thread; others only read it.
        self._work = ShardWork(shard, after_expert=self._pulse)
        # With what is watched for at each.
        self._lanes: dict[LaneEnd, int] = {}
        self._pulsed_at = 0.0
        self._refused: Counter[str] = Counter()
        self._num_refused_requests = 0
        listeners: list[Listener] = [self._tcp] if self._shm is None else [self._tcp, self._shm]
        self._doors = Doors(
            listeners, poller=self._poller, limits=self._limits, refused=self._refused, on_lane=self._greet
        )
        self.error: BaseException | None = None

    def _rules(self, secret: bytes) -> LaneRules:
        return LaneRules(
            secret=secret,
            shard_id=self._shard.shard_id,
            hidden_size=self._shard.hidden_size,
            dtype=self._shard.dtype,
            max_rows=self._limits.max_rows,
            dead_after_s=self._limits.dead_after_s,
            admit=self._admit,
        )

    @property
    def host(self) -> str:
        return self._tcp.host

    @property
    def port(self) -> int:
        return self._tcp.port

    def address(self, node_id: str) -> ShardAddress:
        """Where routers find this service, by either transport."""
        return ShardAddress(
            shard_id=self._shard.shard_id,
            node_id=node_id,
            host=self._tcp.host,
            port=self._tcp.port,
            host_id=host_id(),
            unix_name=None if self._shm is None else self._shm.unix_name,
        )

    def stats(self) -> ServerStats:
        return ServerStats(
            progress=self._work.progress,
            busy_s=self._work.busy_s,
            lanes=dict(Counter([lane.transport for lane in tuple(self._lanes)])),
            refused=dict(self._refused),
            num_refused_requests=self._num_refused_requests,
        )

    def start(self) -> None:
        self._thread.start()

    def drain(self, timeout_s: float) -> None:
        """Takes no more lanes, answers the requests that have arrived whole, then closes. Returns at once."""
        self._drain_deadline = time.monotonic() + timeout_s
        self._close(_Closing.DRAINING)

    def stop(self) -> None:
        """Closes all lanes now, whatever they wait for. Returns at once; see ``wait_closed``."""
        self._close(_Closing.STOPPING)

    def wait_closed(self, timeout_s: float | None = None) -> bool:
        """Whether the thread has ended and its sockets are closed; ``error`` says if something broke it."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _close(self, how: _Closing) -> None:
        self._closing = max(self._closing, how)
        try:
            self._wake_sender.send(b"\0")
        except OSError:
            _LOG.debug("shard %s is closed already", self._shard.shard_id)

    # ---- everything below runs in the thread ----

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        try:
            with torch.inference_mode():
                self._serve()
        except Exception as error:  # noqa: BLE001
            # The edge of the thread: routers see the end of their lanes, the owner sees wait_closed and error.
            _LOG.exception("shard %s: the service loop failed", self._shard.shard_id)
            self.error = error
        finally:
            self._close_everything()

    def _serve(self) -> None:
        self._poller.add(self._wake_receiver, READ, lambda _events: self._wake_receiver.recv(64))
        self._doors.open()
        while not self._finished():
            was_idle = not self._work
            for on_ready, events in self._poller.wait(_IDLE_S if was_idle else 0.0):
                on_ready(events)
            for lane in self._doors.overdue():
                self._refuse_lane(lane, "opening timed out")
            if was_idle:
                self._pulsed_at = time.monotonic()
            if self._work:
                self._compute_tile()
            self._work.free_retired()

    def _finished(self) -> bool:
        if self._closing is not _Closing.DRAINING:
            return self._closing is _Closing.STOPPING
        idle = not self._work and not any(lane.sending for lane in self._lanes)
        return idle or time.monotonic() > self._drain_deadline

    def _greet(self, lane: LaneEnd) -> bool:
        """Whether the lane may stay."""
        full = len(self._lanes) >= self._limits.max_lanes
        if full:
            self._refused["too many lanes"] += 1
        if full or self._closing is not _Closing.NO:
            lane.close()
            return False
        self._lanes[lane] = READ
        self._poller.add(lane, READ, partial(self._serve_lane, lane))
        return True

    def _serve_lane(self, lane: LaneEnd, events: int) -> None:
        if lane not in self._lanes:
            return
        try:
            if events & WRITE:
                lane.flush()
            if events & ~(WRITE | NEWS):
                is_open = lane.lane_id is not None
                lane.hear()
                if not is_open and lane.lane_id is not None:
                    self._poller.renew()
            for request in lane.receive():
                self._work.add(lane, request)
            self._watch(lane)
        except LinkError as error:
            self._drop_lane(lane, str(error))
        except MessageError as error:
            _LOG.warning("shard %s refuses lane %s: %s", self._shard.shard_id, lane.lane_id, error)
            self._refuse_lane(lane, type(error).__name__)

    def _watch(self, lane: LaneEnd) -> None:
        """Reads on only while the lane has room for answers. A lane with neither event waits for its tile."""
        events = READ if lane.num_unanswered < self._limits.max_unanswered else 0
        if lane.sending:
            events |= WRITE
        if self._lanes[lane] != events:
            self._lanes[lane] = events
            self._poller.change(lane, events)

    def _admit(self, header: Header, rows_per_expert: RowsPerExpert) -> Refusal | None:
        who = header.identity
        slots = [(who.layer, expert) for expert, _rows in rows_per_expert]
        reason = self._shard.refusal(epoch=who.epoch, weights_version=who.weights_version, slots=slots)
        if reason is not None:
            self._num_refused_requests += 1
        return reason

    def _compute_tile(self) -> None:
        for lane, request in self._work.compute_tile():
            if lane not in self._lanes:
                continue  # a pulse has found it broken meanwhile
            try:
                lane.reply(request)
                self._watch(lane)
            except LinkError as error:
                self._drop_lane(lane, str(error))

    def _pulse(self) -> None:
        """Only ever after some work: a service that computes no more is as silent as one that is gone."""
        now = time.monotonic()
        if now - self._pulsed_at < _PULSE_S:
            return
        self._pulsed_at = now
        for lane in [lane for lane in self._lanes if lane.num_unanswered]:
            try:
                lane.pulse()
                self._watch(lane)
            except LinkError as error:
                self._drop_lane(lane, str(error))

    def _refuse_lane(self, lane: LaneEnd, kind: str) -> None:
        self._refused[kind] += 1
        self._drop_lane(lane, f"refused: {kind}")

    def _drop_lane(self, lane: LaneEnd, reason: str) -> None:
        """Closes the lane and forgets its requests. Idempotent: a lane may break twice within one tile."""
        if lane not in self._lanes:
            return
        del self._lanes[lane]
        _LOG.info("shard %s: lane %s ends: %s", self._shard.shard_id, lane.lane_id, reason)
        self._work.drop(lane)
        self._doors.forget(lane)
        self._poller.remove(lane)
        lane.close()

    def _close_everything(self) -> None:
        for lane in list(self._lanes):
            self._drop_lane(lane, "the shard closes")
        self._poller.close()
        self._doors.close()
        self._wake_receiver.close()
        self._wake_sender.close()
