"""The router's lane: rows go out to the shards of an epoch and come back, and a lost shard is routed around.

In here a failure is state, not an exception: a shard whose connection breaks, whose answer misses its deadline or
that refuses the epoch is masked for the rest of the epoch, its reason kept in ``lost``, and the rows it owed go to
another live copy under the next attempt number. Rows that no live copy can answer are reported as missing.

Shapes: T tokens, D model, K top-k, R routed rows.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from experts.destinations import choose_shards
from experts.dispatch import Combined, Handle, finish
from experts.epoch import Epoch
from experts.message import Identity
from experts.placement import ShardId
from experts.routed_rows import ExpertSpan, RoutedRows, route_rows
from experts.transport.base import Connector, Link, LinkError, LinkRequest
from experts.transport.select import connect_auto
from experts.transport.stream import byte_view
from experts.transport.waiting import NEWS, READ, WRITE, Poller, WaitPolicy, default_policy


@dataclass(slots=True, kw_only=True, eq=False)
class _LaneHandle(Handle):
    """The same memory as routed.x_RD and y_RD, as the transports take it."""

    rows: memoryview
    results: memoryview
    row_bytes: int


@dataclass(slots=True, kw_only=True, eq=False)
class _Request(LinkRequest):
    """deadline is of time.monotonic()."""

    handle: _LaneHandle
    spans: Sequence[ExpertSpan]
    deadline: float


@dataclass(slots=True, kw_only=True, eq=False)
class _Peer:
    """A shard that lives, as far as is known. requests: under way to it, the oldest first. moved_in: the last turn of
    the pump in which something came from it."""

    shard_id: ShardId
    link: Link
    requests: list[_Request] = field(default_factory=list)
    moved_in: int = -1


class LaneDispatcher:
    """One router rank's connections to the shards of one epoch. A new epoch gets a new dispatcher."""

    def __init__(
        self,
        *,
        lane_id: str,
        epoch: Epoch,
        secret: bytes,
        timeout_s: float,
        connect: Connector = connect_auto,
        wait: WaitPolicy | None = None,
    ) -> None:
        """Connects to every shard that holds slots; one that cannot be had is in ``lost`` from the start.

        timeout_s bounds each connection and each wait for rows. wait: None is what suits the host. Raises ValueError
        for an empty secret or a timeout that is not positive.
        """
        if not secret:
            raise ValueError("secret is empty: a lane must be able to prove itself")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self.lost: dict[ShardId, str] = {}
        self._epoch = epoch
        self._timeout_s = timeout_s
        self._copy_offset = zlib.crc32(lane_id.encode())
        self._step: int | None = None
        self._dispatches_of_layer: dict[int, int] = {}
        self._peers: dict[ShardId, _Peer] = {}
        self._poller = Poller(wait or default_policy())
        self._turn = 0
        for shard_id, slots in epoch.placement.slots_by_shard.items():
            if slots:
                self._open(shard_id, lane_id, secret, connect)
        self._live_copies = self._find_live_copies()

    @property
    def max_rows(self) -> int | None:
        """How many routed rows a dispatch may have; None when no shard is there to say."""
        return min((peer.link.terms.max_rows for peer in self._peers.values()), default=None)

    @property
    def transports(self) -> dict[ShardId, str]:
        """How rows travel to each shard that lives."""
        return {shard_id: peer.link.transport for shard_id, peer in self._peers.items()}

    def begin_step(self, step: int) -> None:
        """Raises ValueError if the step is not above the last one: its messages could be mistaken."""
        if self._step is not None and step <= self._step:
            raise ValueError(f"step must be above {self._step}, got {step}")
        self._step = step
        self._dispatches_of_layer.clear()
        for peer in self._peers.values():
            for request in peer.requests:
                request.handle.abandoned = True
                peer.link.abandon(request)
            peer.requests.clear()

    def dispatch(
        self, layer: int, x_TD: torch.Tensor, topk_ids_TK: torch.Tensor, topk_scores_TK: torch.Tensor
    ) -> Handle:
        if self._step is None:
            raise ValueError("begin_step must name the step before the first dispatch")
        routed = route_rows(x_TD, topk_ids_TK, topk_scores_TK)
        if not routed.x_RD.is_cpu:
            # Transports send from host memory.
            routed = replace(routed, x_RD=routed.x_RD.to("cpu"))
        self._check(layer, routed)
        handle = self._make_handle(layer, routed, self._step)
        self._send(handle, routed.spans)
        # Answers are read while rows leave, else two large messages could wait for each other.
        started_at = time.monotonic()
        while self._is_sending():
            self._pump(started_at)
        return handle

    def combine(self, handle: Handle) -> Combined:
        if handle.abandoned:
            raise ValueError(f"handle of step {handle.step}, layer {handle.layer}: step {self._step} has begun")
        started_at = time.monotonic()
        while handle.num_pending:
            self._pump(started_at)
        return finish(handle)

    def close(self) -> None:
        for peer in self._peers.values():
            self._poller.remove(peer.link)
            peer.link.close()
        self._peers.clear()
        self._poller.close()

    def _open(self, shard_id: ShardId, lane_id: str, secret: bytes, connect: Connector) -> None:
        address = self._epoch.address_of(shard_id)
        try:
            link = connect(address, lane_id=lane_id, secret=secret, timeout_s=self._timeout_s)
        except LinkError as error:
            self.lost[shard_id] = f"shard {address}, no layer yet, {error}"
            return
        peer = _Peer(shard_id=shard_id, link=link)
        self._peers[shard_id] = peer
        self._poller.add(link, READ, partial(self._advance, peer))

    def _find_live_copies(self) -> dict[tuple[int, int], tuple[ShardId, ...]]:
        """Of every slot that the epoch places, (layer, expert): the shards that have it and live."""
        placement = self._epoch.placement
        return {slot: tuple(s for s in placement.shards_of(slot) if s in self._peers) for slot in placement.slots}

    def _check(self, layer: int, routed: RoutedRows) -> None:
        for span in routed.spans:
            if (layer, span.expert) not in self._live_copies:
                raise ValueError(f"expert {span.expert} of layer {layer} is not placed in epoch {self._epoch.number}")
        num_rows, hidden_size = routed.x_RD.shape
        for peer in self._peers.values():
            terms = peer.link.terms
            if terms.hidden_size != hidden_size or getattr(torch, terms.dtype) is not routed.x_RD.dtype:
                dtype = str(routed.x_RD.dtype).removeprefix("torch.")
                raise ValueError(
                    f"rows are {hidden_size} x {dtype}, the shards have {terms.hidden_size} x {terms.dtype}"
                )
            if num_rows > terms.max_rows:
                raise ValueError(f"{num_rows} rows at once, the shards take at most {terms.max_rows}")

    def _make_handle(self, layer: int, routed: RoutedRows, step: int) -> _LaneHandle:
        micro_batch = self._dispatches_of_layer.get(layer, 0)
        self._dispatches_of_layer[layer] = micro_batch + 1
        y_RD = torch.empty_like(routed.x_RD)
        return _LaneHandle(
            layer=layer,
            routed=routed,
            y_RD=y_RD,
            step=step,
            micro_batch=micro_batch,
            rows=byte_view(routed.x_RD),
            results=byte_view(y_RD),
            row_bytes=y_RD.shape[1] * y_RD.dtype.itemsize,
        )

    def _send(self, handle: _LaneHandle, spans: Sequence[ExpertSpan]) -> None:
        """Sends each span to a live copy, under the handle's next attempt; without a live copy it is missing."""
        copies = {span.expert: self._live_copies[handle.layer, span.expert] for span in spans}
        chosen = choose_shards(copies, offset=self._copy_offset)
        attempt = handle.num_attempts
        handle.num_attempts += 1
        by_shard: dict[ShardId, list[ExpertSpan]] = {}
        for span in spans:
            shard_id = chosen.get(span.expert)
            if shard_id is None:
                handle.missing.append(span)
            elif shard_id in by_shard:
                by_shard[shard_id].append(span)
            else:
                by_shard[shard_id] = [span]
        for shard_id, shard_spans in by_shard.items():
            self._submit(shard_id, handle, shard_spans, attempt)

    def _submit(self, shard_id: ShardId, handle: _LaneHandle, spans: Sequence[ExpertSpan], attempt: int) -> None:
        peer = self._peers.get(shard_id)
        if peer is None:
            # Lost since it was chosen, while a sibling request was being sent.
            self._send(handle, spans)
            return
        request = self._make_request(peer, handle, spans, attempt)
        peer.requests.append(request)
        handle.num_pending += 1
        try:
            peer.link.submit(request)
            self._watch(peer)
        except LinkError as error:
            self._lose(peer, phase="send", why=str(error))

    def _make_request(self, peer: _Peer, handle: _LaneHandle, spans: Sequence[ExpertSpan], attempt: int) -> _Request:
        row_bytes = handle.row_bytes
        cuts = [slice(start * row_bytes, stop * row_bytes) for _expert, start, stop in spans]
        return _Request(
            identity=Identity(
                self._epoch.number,
                self._epoch.weights_version,
                peer.link.terms.lane,
                handle.step,
                handle.layer,
                handle.micro_batch,
                attempt,
            ),
            rows_per_expert=[(expert, stop - start) for expert, start, stop in spans],
            rows=[handle.rows[cut] for cut in cuts],
            results=[handle.results[cut] for cut in cuts],
            handle=handle,
            spans=spans,
            deadline=time.monotonic() + self._timeout_s,
        )

    def _is_sending(self) -> bool:
        return any(peer.link.sending and bool(peer.requests) for peer in self._peers.values())

    def _pump(self, started_at: float) -> None:
        """One turn of moving bytes both ways. Some request must be under way; each has a deadline."""
        self._turn += 1
        deadline = min([peer.requests[0].deadline for peer in self._peers.values() if peer.requests])
        for on_ready, events in self._poller.wait(max(0.0, deadline - time.monotonic())):
            on_ready(events)
        now = time.monotonic()
        if now > deadline:
            self._expire(now, started_at)

    def _advance(self, peer: _Peer, events: int) -> None:
        if peer.shard_id not in self._peers:
            # Lost in this very turn.
            return
        peer.moved_in = self._turn
        if events & ~(WRITE | NEWS):
            peer.link.hear()
        refused = None
        for request in peer.link.advance():
            assert isinstance(request, _Request)
            if request.refusal is not None:
                refused = request.refusal
            else:
                peer.requests.remove(request)
                request.handle.num_pending -= 1
        if refused is not None:
            self._lose(peer, phase="wait", why=f"refused epoch {self._epoch.number}: {refused.name}")
        elif peer.link.broken is not None:
            self._lose(peer, phase="wait", why=peer.link.broken)
        else:
            self._watch(peer)

    def _expire(self, now: float, started_at: float) -> None:
        """Gives up shards past a deadline. One whose answer is just coming in gets as long again, no more."""
        for peer in list(self._peers.values()):
            # Losing one shard gives others new requests, and may lose others.
            if peer.shard_id not in self._peers or not peer.requests:
                continue
            oldest = peer.requests[0].deadline
            is_moving = peer.moved_in == self._turn
            if now > oldest and (not is_moving or now > max(oldest, started_at) + self._timeout_s):
                phase = "send" if peer.link.sending else "wait"
                self._lose(peer, phase=phase, why=f"no answer within {self._timeout_s:g} s")

    def _watch(self, peer: _Peer) -> None:
        self._poller.change(peer.link, READ | WRITE if peer.link.wants_to_write else READ)

    def _lose(self, peer: _Peer, *, phase: str, why: str) -> None:
        """Masks the shard, keeps the reason, and sends what it owed elsewhere. Idempotent."""
        if self._peers.pop(peer.shard_id, None) is None:
            return
        self._live_copies = self._find_live_copies()
        self._poller.remove(peer.link)
        peer.link.close()
        layers = sorted({request.handle.layer for request in peer.requests})
        where = f"layer {', '.join(map(str, layers))}" if layers else "no rows under way"
        address = self._epoch.address_of(peer.shard_id)
        self.lost[peer.shard_id] = f"shard {address}, {where}, phase {phase}: {why}"
        owed, peer.requests = peer.requests, []
        for request in owed:
            request.handle.num_pending -= 1
            self._send(request.handle, request.spans)
