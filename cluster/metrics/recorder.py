"""What a process counts with while it works. Belongs to one thread."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from cluster.metrics.definitions import Kind, Metric
from cluster.metrics.snapshot import HistogramCounts, Snapshot


class Recorder:
    """Counters and histograms of the given metrics, from zero. Cheap enough to be called for every token."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._numbers: dict[str, dict[tuple[str, ...], float]] = {}
        self._histograms: dict[str, HistogramCounts] = {}
        for metric in metrics:
            if metric.kind is Kind.HISTOGRAM:
                self._histograms[metric.name] = HistogramCounts(counts=[0] * (len(metric.buckets) + 1))
            elif metric.kind is Kind.COUNTER:
                initial_labels = metric.initial_labels if metric.labels else ((),)
                self._numbers[metric.name] = dict.fromkeys(initial_labels, 0.0)

    def add(self, metric: Metric, amount: float = 1.0, *labels: str) -> None:
        """Counts a counter up. amount must not be negative."""
        assert amount >= 0 and len(labels) == len(metric.labels), metric.name  # noqa: PT018 one contract
        series = self._numbers[metric.name]
        series[labels] = series.get(labels, 0.0) + amount

    def observe(self, metric: Metric, value: float, times: int = 1) -> None:
        """value: of each of so many observations, in the metric's unit."""
        histogram = self._histograms[metric.name]
        histogram.counts[bisect_left(metric.buckets, value)] += times
        histogram.total += value * times

    def snapshot(self) -> Snapshot:
        """A copy: what is counted later is not in it."""
        return Snapshot(
            numbers={name: dict(series) for name, series in self._numbers.items()},
            histograms={
                name: HistogramCounts(counts=list(histogram.counts), total=histogram.total)
                for name, histogram in self._histograms.items()
            },
        )
