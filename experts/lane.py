"""The router's lane: rows go out to the shards of an epoch and come back, and a lost shard is routed around.

In here a failure is state, not an exception: a shard whose connection breaks, whose answer misses its deadline or
that refuses the epoch is masked for the rest of the epoch, its reason kept in ``lost``, and the rows it owed go to
another live copy under the next attempt number. Rows that no live copy can answer are reported as missing.

Shapes: T tokens, D model, K top-k, R routed rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from experts.destinations import LayerDestinations, ShardOrder
from experts.dispatch import Combined, Handle
from experts.epoch import Epoch, ShardAddress
from experts.lane_request import LaneHandle, LaneRequest, request_for_spans, requests_by_shard
from experts.lane_routes import LaneRoutes
from experts.message import PAIR_BYTES, Identity, encode_request_header
from experts.native.lane_kernels import lane_kernels
from experts.peer import Patience, Peer
from experts.placement import ShardId
from experts.row_sort import RowSorter
from experts.transport.base import Connector, Link, LinkError
from experts.transport.select import connect_auto
from experts.transport.waiting import NEWS, READ, WRITE, WaitPolicy, make_poller

logger = logging.getLogger(__name__)


class LaneDispatcher:
    """One router rank's connections to the shards of the epoch it uses; ``adopt`` brings it into another one."""

    def __init__(
        self,
        *,
        lane_id: str,
        epoch: Epoch,
        secret: bytes,
        timeout_s: float,
        silence_s: float = 1.0,
        connect: Connector = connect_auto,
        wait: WaitPolicy | None = None,
    ) -> None:
        """Connects to every shard that holds slots; one that cannot be had is in ``lost`` from the start.

        timeout_s bounds each connection and each wait for rows; a shard that owes rows and shows no sign of work for
        silence_s is given up before. wait: None is what suits the host. Raises ValueError for an empty secret or a
        time that is not positive.
        """
        if not secret:
            raise ValueError("secret is empty: a lane must be able to prove itself")
        self.lost: dict[ShardId, str] = {}
        self._epoch = epoch
        self._lane_id = lane_id
        self._secret = secret
        self._connect = connect
        self._patience = Patience(timeout_s=timeout_s, silence_s=silence_s)
        self._step: int | None = None
        self._dispatches_of_layer: dict[int, int] = {}
        self._peers: dict[ShardId, Peer] = {}
        self._routes = LaneRoutes(epoch, self._peers, lane_id=lane_id)
        self._poller = make_poller(wait)
        self._sorter = RowSorter(lane_kernels())
        for shard_id in self.lacks(epoch):
            self._open(shard_id)

    @property
    def max_rows(self) -> int | None:
        """How many routed rows a dispatch may have; None when no shard is there to say."""
        return min((peer.link.terms.max_rows for peer in self._peers.values()), default=None)

    @property
    def transports(self) -> dict[ShardId, str]:
        """By what rows travel to each shard that lives."""
        return {shard_id: peer.link.transport for shard_id, peer in self._peers.items()}

    def begin_step(self, step: int) -> None:
        """Raises ValueError if the step is not above the last one: its messages could be mistaken."""
        if self._step is not None and step <= self._step:
            raise ValueError(f"step must be above {self._step}, got {step}")
        self._step = step
        self._dispatches_of_layer.clear()
        self._abandon_requests()

    def dispatch(
        self, layer: int, x_TD: torch.Tensor, topk_ids_TK: torch.Tensor, topk_scores_TK: torch.Tensor
    ) -> Handle:
        if self._step is None:
            raise ValueError("begin_step must name the step before the first dispatch")
        destinations = self._routes.of_layer(layer)
        self._routes.check(topk_ids_TK.numel(), x_TD)
        try:
            order = destinations.order(topk_ids_TK)
            plan, rows_RB = self._sorter.sort(x_TD, topk_ids_TK, topk_scores_TK, order)
        except IndexError:
            raise self._routes.not_placed(layer, int(topk_ids_TK.max())) from None
        micro_batch = self._dispatches_of_layer.get(layer, 0)
        self._dispatches_of_layer[layer] = micro_batch + 1
        handle = LaneHandle(layer, self._step, micro_batch, x_TD, plan, rows_RB, np.empty_like(rows_RB))
        self._send(handle, order, destinations)
        # Answers are read while rows leave, else two large messages could wait for each other.
        self._pump(self._is_sending)
        return handle

    def combine(self, handle: Handle) -> Combined:
        assert isinstance(handle, LaneHandle)
        if handle.abandoned:
            raise ValueError(f"handle of step {handle.step}, layer {handle.layer}: step {self._step} has begun")
        self._pump(lambda: handle.num_pending > 0)
        return handle.finish(self._sorter)

    def close(self) -> None:
        for peer in self._peers.values():
            self._poller.remove(peer.link)
            peer.link.close()
        self._peers.clear()
        self._poller.close()

    # Epochs

    @property
    def epoch(self) -> int:
        return self._epoch.number

    def lacks(self, epoch: Epoch) -> tuple[ShardId, ...]:
        """The shards of an epoch to which there is no living link: those must be connected before it is adopted."""
        placement = epoch.placement.slots_by_shard
        return tuple(shard_id for shard_id, slots in placement.items() if slots and shard_id not in self._peers)

    def connect(self, address: ShardAddress) -> Link:
        """A new link, for ``adopt``. May be called from any thread. Raises LinkError, at the latest at timeout_s."""
        return self._connect(address, lane_id=self._lane_id, secret=self._secret, timeout_s=self._patience.timeout_s)

    def adopt(self, epoch: Epoch, opened: Mapping[ShardId, Link], failed: Mapping[ShardId, str]) -> None:
        """Goes over to another epoch, between two steps: handles that are open are abandoned.

        Living links to shards that stay are kept, as are the masks of those for which there is no new link; opened
        and failed come from ``connect``. Links to shards that the epoch does not have are closed.
        """
        self._abandon_requests()
        stays = {shard_id for shard_id, slots in epoch.placement.slots_by_shard.items() if slots}
        for shard_id in [*self._peers]:
            if shard_id not in stays or shard_id in opened:
                self._drop_link(shard_id)
        self._epoch = epoch
        self._routes = LaneRoutes(epoch, self._peers, lane_id=self._lane_id)
        for shard_id, link in opened.items():
            if shard_id in stays:
                self._take_link(shard_id, link)
            else:
                link.close()
        reasons = {**self.lost, **failed}
        self.lost = {shard_id: reasons.get(shard_id, "never connected") for shard_id in self.lacks(epoch)}

    def _open(self, shard_id: ShardId) -> None:
        address = self._epoch.address_of(shard_id)
        try:
            self._take_link(shard_id, self.connect(address))
        except LinkError as error:
            self.lost[shard_id] = not_connected(address, error)

    def _take_link(self, shard_id: ShardId, link: Link) -> None:
        peer = Peer(shard_id=shard_id, link=link, dtype=getattr(torch, link.terms.dtype))
        self._peers[shard_id] = peer
        self._poller.add(link, READ, partial(self._advance, peer))

    def _drop_link(self, shard_id: ShardId) -> list[LaneRequest]:
        """Closes the link and returns the requests that were under way on it."""
        peer = self._peers.pop(shard_id)
        self._routes.forget()
        self._poller.remove(peer.link)
        peer.link.close()
        owed, peer.requests = peer.requests, []
        return owed

    def _abandon_requests(self) -> None:
        for peer in self._peers.values():
            for request in peer.requests:
                request.handle.abandoned = True
                peer.link.abandon(request)
            peer.requests.clear()

    def _send(self, handle: LaneHandle, order: ShardOrder, destinations: LayerDestinations) -> None:
        """Sends all rows, to each shard its run; those of which no copy lives are missing.

        Raises ValueError for an expert that is placed nowhere, before anything is sent.
        """
        requests = requests_by_shard(handle, order.shards)
        if requests and requests[-1][0] == destinations.unplaced:
            raise self._routes.not_placed(handle.layer, handle.plan.spans[-1].expert)
        attempt = handle.next_attempt()
        for shard, request in requests:
            if shard == destinations.missing:
                handle.missing.extend([handle.plan.spans[number] for number in request.span_numbers])
            else:
                self._submit(self._routes.shard_ids[shard], request, attempt)

    def _send_again(self, handle: LaneHandle, span_numbers: Sequence[int]) -> None:
        """Sends spans that a lost shard owed to other copies, under the handle's next attempt."""
        spans = handle.plan.spans
        chosen = self._routes.choose(handle.layer, [spans[number].expert for number in span_numbers])
        attempt = handle.next_attempt()
        by_shard: dict[ShardId, list[int]] = {}
        for number in span_numbers:
            shard_id = chosen.get(spans[number].expert)
            if shard_id is None:
                handle.missing.append(spans[number])
            else:
                by_shard.setdefault(shard_id, []).append(number)
        for shard_id, numbers in by_shard.items():
            self._submit(shard_id, request_for_spans(handle, numbers), attempt)

    def _submit(self, shard_id: ShardId, request: LaneRequest, attempt: int) -> None:
        handle = request.handle
        peer = self._peers.get(shard_id)
        if peer is None:
            # Lost since it was chosen, while a sibling request was being sent.
            self._send_again(handle, request.span_numbers)
            return
        epoch = self._epoch
        identity = Identity(
            epoch.number,
            epoch.weights_version,
            peer.link.terms.lane,
            handle.step,
            handle.layer,
            handle.micro_batch,
            attempt,
        )
        num_slots = len(request.pairs) // PAIR_BYTES
        request.header = encode_request_header(identity, num_slots=num_slots, num_rows=request.num_rows)
        request.deadline = time.monotonic() + self._patience.timeout_s
        peer.add(request)
        handle.num_pending += 1
        try:
            peer.link.submit(request)
        except LinkError as error:
            self._lose(peer, phase="send", why=str(error))
            return
        self._watch(peer)

    def _is_sending(self) -> bool:
        return any(peer.link.sending for peer in self._peers.values() if peer.requests)

    def _pump(self, is_needed: Callable[[], bool]) -> None:
        """Moves bytes both ways as long as it is needed. Ends: every request under way has a deadline."""
        if not is_needed():
            return
        started_at = looked_at = time.monotonic()
        look_s = self._patience.look_s
        while is_needed():
            for on_ready, events in self._poller.wait(max(0.0, looked_at + look_s - time.monotonic())):
                on_ready(events)
            now = time.monotonic()
            if now - looked_at >= look_s:
                # What is more than that is this process's own delay, of which no shard knows.
                self._look(now, min(now - looked_at, 2 * look_s), started_at)
                looked_at = now

    def _advance(self, peer: Peer, events: int) -> None:
        if peer.shard_id not in self._peers:
            # Lost in this very turn.
            return
        if events & ~(WRITE | NEWS):
            peer.link.hear()
        refused = None
        for request in peer.link.advance():
            assert isinstance(request, LaneRequest)
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

    def _look(self, now: float, passed_s: float, waiting_since: float) -> None:
        """Gives up shards that have kept this lane waiting for too long."""
        for peer in list(self._peers.values()):
            # Losing one shard gives others new requests, and may lose others.
            if peer.shard_id in self._peers and peer.requests:
                why = peer.complaint(self._patience, now=now, passed_s=passed_s, waiting_since=waiting_since)
                if why is not None:
                    self._lose(peer, phase=peer.phase, why=why)

    def _watch(self, peer: Peer) -> None:
        if peer.link.wants_to_write is not peer.is_writing:
            peer.is_writing = not peer.is_writing
            self._poller.change(peer.link, READ | WRITE if peer.is_writing else READ)

    def _lose(self, peer: Peer, *, phase: str, why: str) -> None:
        """Masks the shard, keeps the reason, and sends what it owed elsewhere. Idempotent."""
        if peer.shard_id not in self._peers:
            return
        owed = self._drop_link(peer.shard_id)
        layers = sorted({request.handle.layer for request in owed})
        where = f"layer {', '.join(map(str, layers))}" if layers else "no rows under way"
        address = self._epoch.address_of(peer.shard_id)
        self.lost[peer.shard_id] = f"shard {address}, {where}, phase {phase}: {why}"
        logger.error("lost %s", self.lost[peer.shard_id])
        for request in owed:
            request.handle.num_pending -= 1
            self._send_again(request.handle, request.span_numbers)


def not_connected(address: ShardAddress, error: LinkError) -> str:
    """Why a shard is lost from the start."""
    return f"shard {address}, no layer yet, {error}"
