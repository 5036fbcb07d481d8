"""The rows of a dispatch as requests: one for each shard that gets some.

Shapes: D model, R routed rows, S spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from experts.destinations import LayerDestinations
from experts.dispatch import Handle
from experts.message import PAIR_BYTES, encode_rows_of_experts, encode_rows_per_expert
from experts.routed_rows import RoutedRows
from experts.transport.base import LinkRequest
from experts.transport.stream import byte_view


@dataclass(slots=True, kw_only=True, eq=False)
class LaneHandle(Handle):
    """rows, results: the memory of routed.x_RD and y_RD."""

    rows: memoryview
    results: memoryview
    row_bytes: int

    def next_attempt(self) -> int:
        self.num_attempts += 1
        return self.num_attempts - 1


@dataclass(slots=True, eq=False)
class LaneRequest(LinkRequest):
    """For some spans of a handle, by their numbers. Whoever submits it fills header and deadline, which is of
    time.monotonic()."""

    handle: LaneHandle = field(kw_only=True)
    span_numbers: Sequence[int] = field(kw_only=True)
    deadline: float = 0.0


def make_handle(layer: int, routed: RoutedRows, *, step: int, micro_batch: int) -> LaneHandle:
    """routed must be on the CPU."""
    y_RD = torch.empty_like(routed.x_RD)
    return LaneHandle(
        layer=layer,
        routed=routed,
        y_RD=y_RD,
        step=step,
        micro_batch=micro_batch,
        rows=byte_view(routed.x_RD),
        results=byte_view(y_RD),
        row_bytes=y_RD.shape[1] * y_RD.itemsize,
    )


def requests_by_shard(handle: LaneHandle, destinations: LayerDestinations) -> list[tuple[int, LaneRequest]]:
    """All rows of the handle, routed by ``destinations.order``: the number of a shard, and the run of rows it gets."""
    routed, row_bytes = handle.routed, handle.row_bytes
    bounds = [0, *routed.stops_S.tolist()]
    rows_S = routed.stops_S.copy()
    rows_S[1:] -= routed.stops_S[:-1]
    pairs = encode_rows_of_experts(routed.experts_S, rows_S)
    found: list[tuple[int, LaneRequest]] = []
    for shard, first, stop in _runs((routed.order_S // destinations.num_experts).tolist()):
        start_row, stop_row = bounds[first], bounds[stop]
        cut = slice(start_row * row_bytes, stop_row * row_bytes)
        request = LaneRequest(
            b"",
            pairs[first * PAIR_BYTES : stop * PAIR_BYTES],
            (handle.rows[cut],),
            (handle.results[cut],),
            stop_row - start_row,
            handle=handle,
            span_numbers=range(first, stop),
        )
        found.append((shard, request))
    return found


def request_for_spans(handle: LaneHandle, span_numbers: Sequence[int]) -> LaneRequest:
    """Any spans of the handle, in ascending order of their experts."""
    all_spans, row_bytes = handle.routed.spans, handle.row_bytes
    spans = sorted([all_spans[number] for number in span_numbers])
    cuts = [slice(start * row_bytes, stop * row_bytes) for _expert, start, stop in spans]
    return LaneRequest(
        b"",
        encode_rows_per_expert([(expert, stop - start) for expert, start, stop in spans]),
        [handle.rows[cut] for cut in cuts],
        [handle.results[cut] for cut in cuts],
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
