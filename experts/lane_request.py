"""A dispatch on its way: its rows on the host, and the requests that carry them, one for each shard that gets some.

Shapes: T tokens, D model, K top-k, R = T * K routed rows, S spans, B bytes of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from experts.dispatch import Combined, Handle
from experts.message import encode_rows_per_expert
from experts.row_plan import ExpertSpan, RowPlan
from experts.row_sort import Bytes, RowSorter
from experts.transport.base import LinkRequest


@dataclass(slots=True, eq=False)
class LaneHandle(Handle):
    """like_TD: the tokens, for their type and place. results_RB: room for the answers, before a row is sent.

    The dispatcher fills the rest: the spans no live shard could answer, how many requests are under way and how often
    rows were sent so far, and whether a later step began before the combine.
    """

    layer: int
    step: int
    micro_batch: int
    like_TD: torch.Tensor
    plan: RowPlan
    rows_RB: Bytes
    results_RB: Bytes
    missing: list[ExpertSpan] = field(default_factory=list)
    num_pending: int = 0
    num_attempts: int = 0
    abandoned: bool = False

    @property
    def row_bytes(self) -> int:
        num_bytes: int = self.rows_RB.shape[1]
        return num_bytes

    def next_attempt(self) -> int:
        self.num_attempts += 1
        return self.num_attempts - 1

    def finish(self, sorter: RowSorter) -> Combined:
        """The result, once every row was answered or given up."""
        plan, device = self.plan, self.like_TD.device
        if not len(self.results_RB):
            return Combined(torch.empty_like(self.like_TD), None)
        for span in self.missing:
            self.results_RB[span.start : span.stop] = 0
        y_TD = sorter.put_back(self.results_RB, plan, self.like_TD)
        missing_T = torch.from_numpy(plan.tokens_of(self.missing)).to(device) if self.missing else None
        return Combined(y_TD.to(device), missing_T)


@dataclass(slots=True, eq=False)
class LaneRequest(LinkRequest):
    """For some spans of a handle, by their numbers. Whoever submits it fills header and deadline, which is of
    time.monotonic()."""

    handle: LaneHandle = field(kw_only=True)
    span_numbers: Sequence[int] = field(kw_only=True)
    deadline: float = 0.0


def requests_by_shard(handle: LaneHandle, shards: Sequence[int]) -> list[tuple[int, LaneRequest]]:
    """All rows of the handle: the number of a shard, and the run of rows it gets. shards: of each rank of the plan's
    order, which goes shard by shard."""
    plan, row_bytes = handle.plan, handle.row_bytes
    rows, results = handle.rows_RB.reshape(-1).data, handle.results_RB.reshape(-1).data
    found: list[tuple[int, LaneRequest]] = []
    for shard, first, stop in _runs([shards[rank] for rank in plan.ranks]):
        spans = plan.spans[first:stop]
        start_row, stop_row = spans[0].start, spans[-1].stop
        cut = slice(start_row * row_bytes, stop_row * row_bytes)
        request = LaneRequest(
            b"",
            encode_rows_per_expert([(expert, stop - start) for expert, start, stop in spans]),
            (rows[cut],),
            (results[cut],),
            stop_row - start_row,
            handle=handle,
            span_numbers=range(first, stop),
        )
        found.append((shard, request))
    return found


def request_for_spans(handle: LaneHandle, span_numbers: Sequence[int]) -> LaneRequest:
    """Any spans of the handle, in ascending order of their experts."""
    all_spans, row_bytes = handle.plan.spans, handle.row_bytes
    rows, results = handle.rows_RB.reshape(-1).data, handle.results_RB.reshape(-1).data
    spans = sorted([all_spans[number] for number in span_numbers])
    cuts = [slice(start * row_bytes, stop * row_bytes) for _expert, start, stop in spans]
    return LaneRequest(
        b"",
        encode_rows_per_expert([(expert, stop - start) for expert, start, stop in spans]),
        [rows[cut] for cut in cuts],
        [results[cut] for cut in cuts],
        sum(stop - start for _expert, start, stop in spans),
        handle=handle,
        span_numbers=span_numbers,
    )


def _runs(values: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Each run of equal values: the value, where it starts and where it stops."""
    first = 0
    for place in range(1, len(values) + 1):
        if place == len(values) or values[place] != values[first]:
            yield values[first], first, place
            first = place
