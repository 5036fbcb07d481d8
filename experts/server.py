"""The service loop of a shard: one thread, many lanes.

It reads whatever has arrived, computes one tile, sends what is ready, and looks again. It never blocks on a
router: results overwrite the rows they answer and leave as the router takes them. A lane that breaks the protocol
is closed and counted; the others do not notice.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum

import torch

from experts.message import Header, MessageError, Refusal, RowsPerExpert
from experts.placement import Slot
from experts.shard import Shard
from experts.tiles import ExpertTile, TileQueue
from experts.transport.base import LaneEnd, LinkError
from experts.transport.tcp_listener import LaneRules, TcpListener

_LOG = logging.getLogger(__name__)

# How long the shard leaves its listener alone when the system gives it no further socket.
_DEAF_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """max_rows: of one request. max_unanswered: requests of one lane before the shard stops reading it."""

    max_rows: int = 1 << 16
    max_lanes: int = 1024
    max_unanswered: int = 8
    opening_s: float = 5.0
    dead_after_s: float = 20.0


class _Closing(IntEnum):
    """How far the server is on its way out; only grows."""

    NO = 0
    DRAINING = 1
    STOPPING = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStats:
    """progress ticks once per tile. refused counts lanes closed for what they sent, by kind of error."""

    progress: int
    busy_s: float
    num_lanes: int
    refused: dict[str, int]
    num_refused_requests: int


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
    ) -> None:
        """Binds the port (0: the system chooses). num_threads: of one matmul.

        Raises ValueError for an empty secret, OSError if the port cannot be had.
        """
        if not secret:
            raise ValueError("secret is empty: a lane must be able to prove itself")
        self._shard = shard
        self._limits = limits or ServerLimits()
        self._num_threads = num_threads
        self._listener = TcpListener(host, port, self._rules(secret))
        self._selector = selectors.DefaultSelector()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name=f"shard-{shard.shard_id}", daemon=True)
        self._closing = _Closing.NO
        self._drain_deadline = 0.0
        # What follows belongs to the thread; others only read it.
        self._tiles = TileQueue()
        self._opened_at: dict[LaneEnd, float] = {}
        self._num_accepted = 0
        self._deaf_until = 0.0
        self._progress = 0
        self._busy_s = 0.0
        self._refused: Counter[str] = Counter()
        self._num_refused_requests = 0
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
        return self._listener.host

    @property
    def port(self) -> int:
        return self._listener.port

    def stats(self) -> ServerStats:
        return ServerStats(
            progress=self._progress,
            busy_s=self._busy_s,
            num_lanes=len(self._opened_at),
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
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        while not self._finished():
            self._poll(timeout_s=0.0 if self._tiles else 1.0)
            if self._tiles:
                self._compute_tile()
            if self._shard.has_retired:
                self._shard.free_retired(in_use=self._tiles.slots)

    def _finished(self) -> bool:
        if self._closing is not _Closing.DRAINING:
            return self._closing is _Closing.STOPPING
        idle = not self._tiles and not any(lane.sending for lane in self._opened_at)
        return idle or time.monotonic() > self._drain_deadline

    def _poll(self, timeout_s: float) -> None:
        self._listen_again()
        for key, events in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._wake_receiver:
                self._wake_receiver.recv(64)
            elif key.fileobj in self._opened_at:
                self._serve_lane(key.data, events)
        self._close_unopened()

    def _accept(self) -> None:
        self._num_accepted += 1
        try:
            lane = self._listener.accept(self._num_accepted)
        except OSError as error:
            # Out of file descriptors, mostly. The listener would stay ready and keep the loop spinning.
            _LOG.warning("shard %s takes no lane for now: %s", self._shard.shard_id, error)
            self._refused["no socket"] += 1
            self._selector.unregister(self._listener)
            self._deaf_until = time.monotonic() + _DEAF_S
            return
        if lane is None:
            return
        if self._closing is not _Closing.NO:
            lane.close()
            return
        if len(self._opened_at) >= self._limits.max_lanes:
            self._refused["too many lanes"] += 1
            lane.close()
            return
        self._opened_at[lane] = time.monotonic()
        self._selector.register(lane, selectors.EVENT_READ, data=lane)

    def _listen_again(self) -> None:
        if self._listener not in self._selector.get_map() and time.monotonic() > self._deaf_until:
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _close_unopened(self) -> None:
        latest = time.monotonic() - self._limits.opening_s
        for lane in [lane for lane, at in self._opened_at.items() if lane.lane_id is None and at < latest]:
            self._refuse_lane(lane, "opening timed out")

    def _serve_lane(self, lane: LaneEnd, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                lane.flush()
            if events & selectors.EVENT_READ:
                for request in lane.receive():
                    self._tiles.add(lane, request)
            self._watch(lane)
        except LinkError as error:
            self._drop_lane(lane, str(error))
        except MessageError as error:
            _LOG.warning("shard %s refuses lane %s: %s", self._shard.shard_id, lane.lane_id, error)
            self._refuse_lane(lane, type(error).__name__)

    def _watch(self, lane: LaneEnd) -> None:
        """Reads on only while the lane has room for answers. A lane with neither event waits for its tile."""
        read = selectors.EVENT_READ if lane.num_unanswered < self._limits.max_unanswered else 0
        events = read | (selectors.EVENT_WRITE if lane.sending else 0)
        registered = self._selector.get_map().get(lane)
        if registered is None:
            if events:
                self._selector.register(lane, events, data=lane)
        elif not events:
            self._selector.unregister(lane)
        elif registered.events != events:
            self._selector.modify(lane, events, data=lane)

    def _admit(self, header: Header, rows_per_expert: RowsPerExpert) -> Refusal | None:
        who = header.identity
        slots = [Slot(who.layer, expert) for expert, _rows in rows_per_expert]
        reason = self._shard.refusal(epoch=who.epoch, weights_version=who.weights_version, slots=slots)
        self._num_refused_requests += reason is not None
        return reason

    def _compute_tile(self) -> None:
        started_at = time.monotonic()
        for tile in self._tiles.take():
            self._compute_expert(tile)
        self._progress += 1
        self._busy_s += time.monotonic() - started_at
        for lane, request in self._tiles.pop_finished():
            try:
                lane.reply(request)
                self._watch(lane)
            except LinkError as error:
                self._drop_lane(lane, str(error))

    def _compute_expert(self, tile: ExpertTile) -> None:
        parts_RD = tile.parts_RD
        x_RD = parts_RD[0] if len(parts_RD) == 1 else torch.cat(parts_RD)
        y_RD = self._shard.apply_expert(tile.slot, x_RD.to(self._shard.device))
        for part_RD, result_RD in zip(parts_RD, torch.split(y_RD, [len(part) for part in parts_RD]), strict=True):
            part_RD.copy_(result_RD)

    def _refuse_lane(self, lane: LaneEnd, kind: str) -> None:
        self._refused[kind] += 1
        self._drop_lane(lane, f"refused: {kind}")

    def _drop_lane(self, lane: LaneEnd, reason: str) -> None:
        """Closes the lane and forgets its requests. Idempotent: a lane may break twice within one tile."""
        if self._opened_at.pop(lane, None) is None:
            return
        _LOG.info("shard %s: lane %s ends: %s", self._shard.shard_id, lane.lane_id, reason)
        self._tiles.drop(lane)
        if lane in self._selector.get_map():
            self._selector.unregister(lane)
        lane.close()

    def _close_everything(self) -> None:
        for lane in list(self._opened_at):
            self._drop_lane(lane, "the shard closes")
        self._selector.close()
        self._listener.close()
        self._wake_receiver.close()
        self._wake_sender.close()
