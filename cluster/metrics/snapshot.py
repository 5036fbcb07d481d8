"""The numbers of one process at one moment, or of several added up. Plain, and small enough for every heartbeat."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from cluster.metrics.definitions import Kind, Labels, Metric


class HistogramCounts(msgspec.Struct):
    """counts: observations by bucket, one more than the metric has bounds; none is in two. total: their sum."""

    counts: list[int]
    total: float = 0.0


class Snapshot(msgspec.Struct):
    """By the metric's name, then by its labels' values. Counters and histograms count from the process's start."""

    numbers: dict[str, dict[Labels, float]] = {}
    histograms: dict[str, HistogramCounts] = {}

    def put(self, metric: Metric, value: float, *labels: str) -> None:
        assert len(labels) == len(metric.labels), metric.name
        self.numbers.setdefault(metric.name, {})[labels] = value


def add_up(snapshots: Iterable[Snapshot], metrics: Iterable[Metric]) -> Snapshot:
    """The sum over snapshots of these metrics, which are those of the result."""
    snapshots = tuple(snapshots)
    total = Snapshot()
    for metric in metrics:
        if metric.kind is Kind.HISTOGRAM:
            _add_histogram(total, metric, snapshots)
        else:
            _add_numbers(total, metric, snapshots)
    return total


def _add_numbers(total: Snapshot, metric: Metric, snapshots: Iterable[Snapshot]) -> None:
    sums = dict.fromkeys(metric.initial_labels, 0.0)
    for snapshot in snapshots:
        for labels, value in snapshot.numbers.get(metric.name, {}).items():
            sums[labels] = sums.get(labels, 0.0) + value
    if sums:
        total.numbers[metric.name] = sums


def _add_histogram(total: Snapshot, metric: Metric, snapshots: Iterable[Snapshot]) -> None:
    found = [snapshot.histograms[metric.name] for snapshot in snapshots if metric.name in snapshot.histograms]
    if found:
        total.histograms[metric.name] = HistogramCounts(
            counts=[sum(counts) for counts in zip(*(each.counts for each in found), strict=True)],
            total=sum(each.total for each in found),
        )
