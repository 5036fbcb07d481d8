"""The service's numbers in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from cluster.metrics.definitions import METRICS, Kind, Metric
from cluster.metrics.snapshot import Snapshot

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


def expose(merged: Snapshot, *, model_name: str) -> bytes:
    """merged: see cluster.metrics.merge. Every series has the label model_name."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(_families(merged, model_name)))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, families: Iterable[Family]) -> None:
        self._families = tuple(families)

    def collect(self) -> Iterable[Family]:
        return self._families

    def describe(self) -> Iterable[Family]:
        return ()


def _families(merged: Snapshot, model_name: str) -> Iterator[Family]:
    for metric in METRICS:
        if metric.kind is Kind.HISTOGRAM:
            if metric.name in merged.histograms:
                yield _histogram(metric, merged, model_name)
        elif metric.name in merged.numbers:
            yield _numbers(metric, merged, model_name)


def _label_names(metric: Metric) -> list[str]:
    return ["model_name", *(["member"] if metric.per_member else []), *metric.labels]


def _numbers(metric: Metric, merged: Snapshot, model_name: str) -> CounterMetricFamily | GaugeMetricFamily:
    make = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
    family = make(metric.name, metric.help, labels=_label_names(metric))
    for labels, value in sorted(merged.numbers[metric.name].items()):
        family.add_metric([model_name, *labels], value)
    return family


def _histogram(metric: Metric, merged: Snapshot, model_name: str) -> HistogramMetricFamily:
    histogram = merged.histograms[metric.name]
    bounds = [*(str(bound) for bound in metric.buckets), "+Inf"]
    family = HistogramMetricFamily(metric.name, metric.help, labels=_label_names(metric))
    cumulative = zip(bounds, accumulate(histogram.counts), strict=True)
    family.add_metric([model_name], buckets=list(cumulative), sum_value=histogram.total)
    return family
