"""The router's lane: rows go out to the shards of an epoch and come back, and a lost shard is routed around.

In here a failure is state, not an exception: a shard whose connection breaks, whose answer misses its deadline or
that refuses the epoch is masked for the rest of the epoch, its reason kept in ``lost``, and the rows it owed go to
another live copy under the next attempt number. Rows that no live copy can answer are reported as missing.

Shapes: T tokens, D model, K top-k, R routed rows.
"""

from __future__ import annotations

import logging
import selectors
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from experts.destinations import choose_shards
from experts.dispatch import Combined, Handle, finish
from experts.epoch import Epoch, ShardAddress
from experts.message import Header, Identity, Kind, request_header
from experts.placement import ShardId, Slot
from experts.routed_rows import ExpertSpan, RoutedRows, route_rows
from experts.transport.base import Connector, Link, LinkError
from experts.transport.tcp import connect as connect_tcp

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Request:
    """Rows under way to one shard. deadline is of time.monotonic()."""

    header: Header
    handle: Handle
    spans: list[ExpertSpan]
    deadline: float


class LaneDispatcher:
    """One router rank's connections to the shards of the epoch it uses; ``adopt`` brings it into another one."""

    def __init__(
        self,
        *,
        lane_id: str,
        epoch: Epoch,
        secret: bytes,
        timeout_s: float,
        connect: Connector = connect_tcp,
    ) -> None:
        """Connects to every shard that holds slots; one that cannot be had is in ``lost`` from the start.

        timeout_s bounds each connection and each wait for rows. Raises ValueError for an empty secret or a
        timeout that is not positive.
        """
        if not secret:
            raise ValueError("secret is empty: a lane must be able to prove itself")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self.lost: dict[ShardId, str] = {}
        self._epoch = epoch
        self._lane_id = lane_id
        self._secret = secret
        self._connect = connect
        self._timeout_s = timeout_s
        self._copy_offset = zlib.crc32(lane_id.encode())
        self._step: int | None = None
        self._dispatches_of_layer: dict[int, int] = {}
        self._links: dict[ShardId, Link] = {}
        self._requests: dict[ShardId, dict[Identity, _Request]] = {}
        self._selector = selectors.DefaultSelector()
        for shard_id in self.lacks(epoch):
            self._open(shard_id)

    @property
    def max_rows(self) -> int | None:
        """How many routed rows a dispatch may have; None when no shard is there to say."""
        return min((link.terms.max_rows for link in self._links.values()), default=None)

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
        routed = route_rows(x_TD, topk_ids_TK, topk_scores_TK)
        # Sockets send from host memory; on a CPU this copies nothing.
        routed = replace(routed, x_RD=routed.x_RD.to("cpu"))
        self._check(layer, routed)
        micro_batch = self._dispatches_of_layer.get(layer, 0)
        self._dispatches_of_layer[layer] = micro_batch + 1
        handle = Handle(
            layer=layer,
            routed=routed,
            y_RD=torch.empty_like(routed.x_RD),
            step=self._step,
            micro_batch=micro_batch,
        )
        self._send(handle, routed.spans)
        # Answers are read while rows leave, else two large messages could wait for each other.
        self._pump(until=lambda: not self._is_sending())
        return handle

    def combine(self, handle: Handle) -> Combined:
        if handle.abandoned:
            raise ValueError(f"handle of step {handle.step}, layer {handle.layer}: step {self._step} has begun")
        self._pump(until=lambda: handle.num_pending == 0)
        return finish(handle)

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._requests.clear()
        self._selector.close()

    # Epochs

    @property
    def epoch(self) -> int:
        return self._epoch.number

    def lacks(self, epoch: Epoch) -> tuple[ShardId, ...]:
        """The shards of an epoch to which there is no living link: those must be connected before it is adopted."""
        placement = epoch.placement.slots_by_shard
        return tuple(shard_id for shard_id, slots in placement.items() if slots and shard_id not in self._links)

    def connect(self, address: ShardAddress) -> Link:
        """A new link, for ``adopt``. May be called from any thread. Raises LinkError, at the latest at timeout_s."""
        return self._connect(address, lane_id=self._lane_id, secret=self._secret, timeout_s=self._timeout_s)

    def adopt(self, epoch: Epoch, opened: Mapping[ShardId, Link], failed: Mapping[ShardId, str]) -> None:
        """Goes over to another epoch, between two steps: handles that are open are abandoned.

        Living links to shards that stay are kept, as are the masks of those for which there is no new link; opened
        and failed come from ``connect``. Links to shards that the epoch does not have are closed.
        """
        self._abandon_requests()
        stays = {shard_id for shard_id, slots in epoch.placement.slots_by_shard.items() if slots}
        for shard_id in [*self._links]:
            if shard_id not in stays or shard_id in opened:
                self._drop_link(shard_id)
        self._epoch = epoch
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
        self._links[shard_id] = link
        self._requests[shard_id] = {}
        self._selector.register(link, selectors.EVENT_READ, data=shard_id)

    def _drop_link(self, shard_id: ShardId) -> list[_Request]:
        """Closes the link and returns the requests that were under way on it."""
        link = self._links.pop(shard_id)
        self._selector.unregister(link)
        link.close()
        return list(self._requests.pop(shard_id).values())

    def _abandon_requests(self) -> None:
        for shard_id, requests in self._requests.items():
            for request in requests.values():
                request.handle.abandoned = True
                self._links[shard_id].abandon(request.header)
            requests.clear()

    def _check(self, layer: int, routed: RoutedRows) -> None:
        placement = self._epoch.placement
        for span in routed.spans:
            if not placement.shards_of(Slot(layer, span.expert)):
                raise ValueError(f"expert {span.expert} of layer {layer} is not placed in epoch {self._epoch.number}")
        num_rows, hidden_size = routed.x_RD.shape
        dtype = str(routed.x_RD.dtype).removeprefix("torch.")
        for terms in (link.terms for link in self._links.values()):
            if (terms.hidden_size, terms.dtype) != (hidden_size, dtype):
                raise ValueError(
                    f"rows are {hidden_size} x {dtype}, the shards have {terms.hidden_size} x {terms.dtype}"
                )
            if num_rows > terms.max_rows:
                raise ValueError(f"{num_rows} rows at once, the shards take at most {terms.max_rows}")

    def _send(self, handle: Handle, spans: Sequence[ExpertSpan]) -> None:
        """Sends each span to a live copy, under the handle's next attempt; without a live copy it is missing."""
        copies = {span.expert: self._live_copies(handle.layer, span.expert) for span in spans}
        chosen = choose_shards(copies, offset=self._copy_offset)
        attempt = handle.num_attempts
        handle.num_attempts += 1
        by_shard: dict[ShardId, list[ExpertSpan]] = {}
        for span in spans:
            if span.expert in chosen:
                by_shard.setdefault(chosen[span.expert], []).append(span)
            else:
                handle.missing.append(span)
        for shard_id, shard_spans in by_shard.items():
            self._submit(shard_id, handle, shard_spans, attempt)

    def _live_copies(self, layer: int, expert: int) -> list[ShardId]:
        return [shard for shard in self._epoch.placement.shards_of(Slot(layer, expert)) if shard in self._links]

    def _submit(self, shard_id: ShardId, handle: Handle, spans: list[ExpertSpan], attempt: int) -> None:
        link = self._links.get(shard_id)
        if link is None:
            # Lost since it was chosen, while a sibling request was being sent.
            self._send(handle, spans)
            return
        rows_per_expert = [(span.expert, span.stop - span.start) for span in spans]
        header = request_header(self._identity(link, handle, attempt), rows_per_expert)
        self._requests[shard_id][header.identity] = _Request(
            header=header, handle=handle, spans=spans, deadline=time.monotonic() + self._timeout_s
        )
        handle.num_pending += 1
        rows = [handle.routed.x_RD[span.start : span.stop] for span in spans]
        results = [handle.y_RD[span.start : span.stop] for span in spans]
        try:
            link.submit(header, rows_per_expert, rows, results)
            self._watch(link, shard_id)
        except LinkError as error:
            self._lose(shard_id, phase="send", why=str(error))

    def _identity(self, link: Link, handle: Handle, attempt: int) -> Identity:
        return Identity(
            epoch=self._epoch.number,
            weights_version=self._epoch.weights_version,
            lane=link.terms.lane,
            step=handle.step,
            layer=handle.layer,
            micro_batch=handle.micro_batch,
            attempt=attempt,
        )

    def _is_sending(self) -> bool:
        return any(requests and self._links[shard].sending for shard, requests in self._requests.items())

    def _pump(self, *, until: Callable[[], bool]) -> None:
        """Moves bytes both ways until the condition holds. Ends: every request under way has a deadline."""
        started_at = time.monotonic()
        while not until():
            ready = self._selector.select(self._until_next_deadline())
            readable = {key.data for key, _events in ready}
            for shard_id in readable:
                self._advance(shard_id)
            self._expire(readable, started_at)

    def _until_next_deadline(self) -> float:
        deadlines = [request.deadline for requests in self._requests.values() for request in requests.values()]
        return max(0.0, min(deadlines) - time.monotonic())

    def _advance(self, shard_id: ShardId) -> None:
        link = self._links.get(shard_id)
        if link is None:
            return
        refused = None
        for header in link.advance():
            if header.kind is Kind.REFUSAL:
                refused = header.reason
            else:
                self._requests[shard_id].pop(header.identity).handle.num_pending -= 1
        if refused is not None:
            self._lose(shard_id, phase="wait", why=f"refused epoch {self._epoch.number}: {refused.name}")
        elif link.broken is not None:
            self._lose(shard_id, phase="wait", why=link.broken)
        else:
            self._watch(link, shard_id)

    def _expire(self, moving: set[ShardId], started_at: float) -> None:
        """Gives up shards past a deadline. One whose answer is just coming in gets as long again, no more."""
        now = time.monotonic()
        for shard_id in list(self._links):
            # Losing one shard gives others new requests, and may lose others.
            deadlines = [request.deadline for request in self._requests.get(shard_id, {}).values()]
            oldest = min(deadlines, default=now)
            if now > oldest and (shard_id not in moving or now > max(oldest, started_at) + self._timeout_s):
                phase = "send" if self._links[shard_id].sending else "wait"
                self._lose(shard_id, phase=phase, why=f"no answer within {self._timeout_s:g} s")

    def _watch(self, link: Link, shard_id: ShardId) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.sending else 0)
        if self._selector.get_key(link).events != events:
            self._selector.modify(link, events, data=shard_id)

    def _lose(self, shard_id: ShardId, *, phase: str, why: str) -> None:
        """Masks the shard, keeps the reason, and sends what it owed elsewhere. Idempotent."""
        if shard_id not in self._links:
            return
        owed = self._drop_link(shard_id)
        layers = sorted({request.header.identity.layer for request in owed})
        where = f"layer {', '.join(map(str, layers))}" if layers else "no rows under way"
        self.lost[shard_id] = f"shard {self._epoch.address_of(shard_id)}, {where}, phase {phase}: {why}"
        logger.error("lost %s", self.lost[shard_id])
        for request in owed:
            request.handle.num_pending -= 1
            self._send(request.handle, request.spans)


def not_connected(address: ShardAddress, error: LinkError) -> str:
    """Why a shard is lost from the start."""
    return f"shard {address}, no layer yet, {error}"
