"""Collectors: metrics that `beat` and the workers read from other systems when Prometheus scrapes them."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from config.log_config import get_logger
from worker.errors import error_summary
from worker.metric_types import MetricSample, Source
from worker.metrics import UP

log = get_logger(__name__)

CACHE_TTL_S = 5.0
"""Collected values are cached for this long, however often Prometheus scrapes."""


class CachedQueryCollector(Collector):
    """Values read from another system on a scrape, at most once per `CACHE_TTL_S`.

    `payready_<source>_up`, if the source has it, is 1 if the query succeeded. If it failed, all other samples are left
    out: old values would mislead.
    """

    def __init__(
        self, source: Source, query: Callable[[], Iterable[MetricSample]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._source: Source = source
        self._query = query
        self._clock = clock
        self._lock = threading.Lock()
        self._cached: list[Metric] = []
        self._cached_at = float("-inf")

    def describe(self) -> Iterator[Metric]:
        """Return nothing, so that registering makes no query."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Return the cached values; query first if they have expired."""
        with self._lock:
            if self._clock() - self._cached_at >= CACHE_TTL_S:
                self._cached = [_metric_family(sample) for sample in self._query_samples_and_up()]
                self._cached_at = self._clock()
            return iter(self._cached)

    def _query_samples_and_up(self) -> list[MetricSample]:
        try:
            samples, up = list(self._query()), 1.0
        except Exception as error:  # noqa: BLE001 - any failure means that the source is down
            log.warning("metrics.collect_failed", source=self._source, error=error_summary(error))
            samples, up = [], 0.0
        return [*([UP[self._source].sample({(): up})] if self._source in UP else []), *samples]


def _metric_family(sample: MetricSample) -> Metric:
    family_type = CounterMetricFamily if sample.metric.kind == "counter" else GaugeMetricFamily
    family = family_type(
        sample.name, sample.metric.help_text, labels=tuple(label.name for label in sample.metric.labels)
    )
    for label_values, value in sample.values.items():
        family.add_metric(label_values, value)
    return family


def register_collector(source: Source, query: Callable[[], Iterable[MetricSample]]) -> None:
    """Export the samples that `query` returns."""
    REGISTRY.register(CachedQueryCollector(source, query))
