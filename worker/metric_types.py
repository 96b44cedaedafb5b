"""Types of metrics: definitions, labels and samples, as Prometheus sees them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["counter", "gauge", "histogram"]
Source = Literal["database", "redis", "broker", "admission"]


@dataclass(frozen=True, kw_only=True)
class Label:
    """A label with its values."""

    name: str
    values: Mapping[str, str] = field(default_factory=dict)
    """Each value with its meaning. Empty if the values are not declared here; then `meaning` describes them."""
    meaning: str = ""


@dataclass(frozen=True, kw_only=True)
class MetricDefinition:
    """A metric as Prometheus sees it."""

    name: str
    kind: Kind
    help_text: str
    labels: tuple[Label, ...] = ()
    source: Source | None = None
    """What the value is read from on a scrape; None if each process counts it. `beat` reads it, but for the `admission`
    control of an API key: the workers read that, because `beat` has no API key."""

    def sample(self, values: Mapping[Any, float]) -> "MetricSample":
        """Return a sample with one value per tuple of label values."""
        return MetricSample(metric=self, values=values)


@dataclass(frozen=True, kw_only=True)
class MetricSample:
    """Values of a collected metric, by the values of its labels."""

    metric: MetricDefinition
    values: Mapping[Any, float]
    """The keys are tuples of strings. Their length varies, and the key type of a mapping is invariant, hence `Any`."""

    @property
    def name(self) -> str:
        """Name of the metric."""
        return self.metric.name


class ExpiringValue:
    """A value that becomes NaN `ttl_s` seconds after it was set: by then another process may know a newer one."""

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._set_at_and_value = float("-inf"), float("nan")

    def set(self, value: float) -> None:
        """Set the value as of now."""
        self._set_at_and_value = self._clock(), value

    def __call__(self) -> float:
        """Return the value, NaN if it has expired or was never set."""
        set_at, value = self._set_at_and_value
        return value if self._clock() - set_at < self._ttl_s else float("nan")
