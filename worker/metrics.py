"""What a process counts, and how it tells Prometheus. What the ledger knows is asked of the ledger, not counted here.

Each role is one process with threads, so the library's plain registry is right; replicas are summed by Prometheus.
Names begin with `payready_`, and no label is open-ended: never an account, never a payment.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)
disable_created_metrics()  # type: ignore[no-untyped-call]  # one more sample each, that nothing here reads

DURATION_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120)
CACHE_TTL_S = 5.0
"""Figures that are asked for are this old at most when they are told, and asked for no more often."""

PROVIDER_CALLS = Counter("payready_provider_calls", "Calls made to the provider, by how they ended.", ["result"])
"""`accepted`, `rejected`, `rate_limited`, `not_sent`, `unknown`, `skipped`. A skipped call was claimed and not tried,
because the worker stops or is late (`CallSkipped`) or its own connection pool is full (`ConnectionPoolExhausted`): it says
nothing about the provider, so alerts about the provider must not count it."""

WEBHOOK_DELIVERIES = Counter(
    "payready_webhook_deliveries", "Deliveries at the webhook, each once, by result.", ["result"]
)
"""Answered 2xx: `routine` (nothing in it was ours), `matched` (it brought a REFRESH balance), `connection` (it
brought no more than word of a connection or a profile), `quarantined` (it brought
an event that nobody understood, and maybe balances too). `unsafe`: 503, it could not be kept now. All else was
refused: `stale` (rightly signed, at another time), `mismatch`, `missing`, `malformed`, `no_secret` (401),
`content_type` (415), `too_large` (413), `too_slow` (408), `cut_off`, `no_delivery`, `unreadable` (400)."""

WEBHOOK_EVENTS = Counter(
    "payready_webhook_events", "Events of rightly signed deliveries, by what became of them.", ["result"]
)
"""`routine` (not ours), `matched` (a REFRESH balance), `connection`, `quarantined`, `unreadable` (not even JSON)."""

SUBSCRIPTION_PROBLEMS_GAUGE = Gauge(
    "payready_webhook_subscription_problems",
    "What is wrong with our webhook subscription at the provider, by a check that this process made lately.",
)
"""0: nothing; NaN: not known. One worker at a time checks; where there are several, look at the greatest."""
SUBSCRIPTION_CHECK_TTL_S = 180.0
"""So long a check counts: the next one may be another worker's, and find another thing."""
DELAYED_CALLS = Counter(
    "payready_delayed_calls", "Calls delayed by the rate limiter or the circuit breaker.", ["reason"]
)
"""`rate_limited`, `circuit_open`, `half_open`."""
CIRCUIT_BREAKER_OPENED = Counter(
    "payready_circuit_breaker_opened", "How often calls were stopped, as the provider only failed."
)
BALANCE_POLLS = Counter(
    "payready_balance_polls", "Free reads of a balance before a deadline, by what they gave.", ["result"]
)
"""`found`, `nothing`, `failed`."""
BATCH_FALLBACKS = Counter(
    "payready_batch_fallbacks", "Batches that failed, so that their items were processed one by one.", ["kind"]
)
"""`job`, `call`."""
FEE_CAPS_REACHED = Counter("payready_fee_caps_reached", "Calls that were not made because of a cap.", ["cap"])
FEE_CAP_WARNINGS = Counter("payready_fee_cap_warnings", "Times that a cap was used to four fifths.", ["cap"])
"""`day`, `month`, `account`."""

# What is alerted on is at nought from the start: the first step of a counter that begins with it is not seen.
for _result in ("quarantined", "unavailable", "stale", "mismatch", "no_secret"):
    WEBHOOK_DELIVERIES.labels(_result)
for _cap in ("day", "month", "account"):
    FEE_CAPS_REACHED.labels(_cap)
for _kind in ("job", "call"):
    BATCH_FALLBACKS.labels(_kind)
for _result in ("accepted", "rejected", "rate_limited", "not_sent", "unknown", "skipped"):
    PROVIDER_CALLS.labels(_result)
RESPONSE_SECONDS = Histogram(
    "payready_provider_response_seconds",
    "How long the provider took to answer a call, by its status; `none` if no answer came.",
    ["status"],
    buckets=DURATION_BUCKETS_S,
)
CALL_TO_BALANCE_SECONDS = Histogram(
    "payready_call_to_balance_seconds",
    "From a call to the arrival of the balance that answered it.",
    buckets=DURATION_BUCKETS_S,
)
BALANCE_TO_RESOLUTION_SECONDS = Histogram(
    "payready_balance_to_resolution_seconds",
    "From the arrival of a balance to the settlement of those who waited for it.",
    buckets=DURATION_BUCKETS_S,
)


class ExpiringValue:
    """A value that is not known any more, NaN, unless it is noted again in time: another process may know better."""

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._set_at_and_value = float("-inf"), float("nan")

    def set(self, value: float) -> None:
        """It is this just now."""
        self._set_at_and_value = self._clock(), value

    def __call__(self) -> float:
        """What it is, as far as it is known."""
        at, value = self._set_at_and_value
        return value if self._clock() - at < self._ttl_s else float("nan")


SUBSCRIPTION_PROBLEMS = ExpiringValue(SUBSCRIPTION_CHECK_TTL_S)
"""What is wrong with our subscription; who checks notes it here."""
SUBSCRIPTION_PROBLEMS_GAUGE.set_function(SUBSCRIPTION_PROBLEMS)


@dataclass(frozen=True)
class MetricSample:
    """A metric whose values are asked for: a gauge, or a counter if its name ends in `_total`."""

    name: str
    description: str
    values: Mapping[Any, float]
    """By the values of the labels, a tuple of strings."""
    label_names: tuple[str, ...] = ()

    def to_metric_family(self) -> Metric:
        """As the library has it."""
        counter = self.name.endswith("_total")
        family = (CounterMetricFamily if counter else GaugeMetricFamily)(
            self.name, self.description, labels=self.label_names
        )
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        return family


class PolledCollector(Collector):
    """Figures of something outside this process, asked for when Prometheus asks, and not more often than it can bear.

    `payready_<whom>_up` says whether it answered; when it did not, its other figures are left out: old ones would lie.
    """

    def __init__(
        self, source: str, query: Callable[[], Iterable[MetricSample]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._source = source
        self._query = query
        self._clock = clock
        self._lock = threading.Lock()
        self._cached: list[Metric] = []
        self._cached_at = float("-inf")

    def describe(self) -> Iterator[Metric]:
        """Nothing is asked only to be registered."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """What was told last, or anew."""
        with self._lock:
            if self._clock() - self._cached_at >= CACHE_TTL_S:
                self._cached = [figure.to_metric_family() for figure in self._samples()]
                self._cached_at = self._clock()
            return iter(self._cached)

    def _samples(self) -> list[MetricSample]:
        try:
            figures, up = list(self._query()), 1.0
        except Exception as error:  # noqa: BLE001 - that it cannot be asked is itself what is to be told
            log.warning("the %s cannot be asked for its figures: %s", self._source, str(error).partition("\n")[0])
            figures, up = [], 0.0
        return [MetricSample(f"payready_{self._source}_up", f"1 if the {self._source} answered.", {(): up}), *figures]


def register_collector(source: str, query: Callable[[], Iterable[MetricSample]]) -> None:
    """Have Prometheus told what `question` says of `whom`."""
    REGISTRY.register(PolledCollector(source, query))
