"""What a process counts, and how it tells Prometheus. What the ledger knows is asked of the ledger, not counted here.

Each role is one process with threads, so the library's plain registry is right; replicas are summed by Prometheus.
Names begin with `payready_`, and no label is open-ended: never an account, never a payment.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, disable_created_metrics, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)
disable_created_metrics()  # type: ignore[no-untyped-call]  # one more sample each, that nothing here reads

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120)
ASK_AGAIN_S = 5.0
"""Figures that are asked for are this old at most when they are told, and asked for no more often."""

CALLS = Counter("payready_provider_calls", "Calls made to the provider, by how they ended.", ["result"])
"""`accepted`, `refused`, `throttled`, `unsent`, `uncertain`."""

DELIVERIES = Counter("payready_webhook_deliveries", "Deliveries at the webhook, each once, by result.", ["result"])
"""Answered 2xx: `routine` (nothing in it was ours), `matched` (it brought a REFRESH balance), `connection` (it
brought no more than word of a connection or a profile), `quarantined` (it brought
an event that nobody understood, and maybe balances too). `unsafe`: 503, it could not be kept now. All else was
refused: `stale` (rightly signed, at another time), `mismatch`, `missing`, `malformed`, `no_secret` (401),
`content_type` (415), `too_large` (413), `too_slow` (408), `cut_off`, `no_delivery`, `unreadable` (400)."""

EVENTS = Counter("payready_webhook_events", "Events of rightly signed deliveries, by what became of them.", ["result"])
"""`routine` (not ours), `matched` (a REFRESH balance), `connection`, `quarantined`, `unreadable` (not even JSON)."""

SUBSCRIPTION = Gauge(
    "payready_webhook_subscription_flaws",
    "What is wrong with our webhook subscription at the provider, by a check that this process made lately.",
)
"""0: nothing; NaN: not known. One worker at a time checks; where there are several, look at the greatest."""
CHECK_LASTS_S = 180.0
"""So long a check counts: the next one may be another worker's, and find another thing."""
HELD_BACK = Counter("payready_calls_held_back", "Calls that had to wait for leave to go out.", ["why"])
"""`full`: the budget of calls per second is spent. `shut`: the breaker is open."""
BREAKER_OPENED = Counter("payready_breaker_opened", "How often calls were stopped, as the provider only failed.")
READS = Counter("payready_balance_reads", "Free reads of a balance before a deadline, by what they gave.", ["result"])
"""`found`, `nothing`, `failed`."""
CAPS_REACHED = Counter("payready_fee_caps_reached", "Calls that were not made because of a cap.", ["cap"])
CAPS_NEAR = Counter("payready_fee_caps_near", "Times that a cap was used to four fifths.", ["cap"])
"""`day`, `month`, `account`."""

# What is alerted on is at nought from the start: the first step of a counter that begins with it is not seen.
for _result in ("quarantined", "unsafe", "stale", "mismatch", "no_secret"):
    DELIVERIES.labels(_result)
for _cap in ("day", "month", "account"):
    CAPS_REACHED.labels(_cap)
for _result in ("accepted", "refused", "throttled", "unsent", "uncertain"):
    CALLS.labels(_result)
ANSWERS = Histogram(
    "payready_provider_answer_seconds",
    "How long the provider took to answer a call, by its status; `none` if no answer came.",
    ["status"],
    buckets=SECONDS,
)
EVENT_AFTER_CALL = Histogram(
    "payready_call_to_event_seconds", "From a call to the arrival of the balance that answered it.", buckets=SECONDS
)
SETTLED_AFTER_EVENT = Histogram(
    "payready_event_to_release_seconds",
    "From the arrival of a balance to the settlement of those who waited for it.",
    buckets=SECONDS,
)


class Lately:
    """A value that is not known any more, NaN, unless it is noted again in time: another process may know better."""

    def __init__(self, lasts_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lasts_s = lasts_s
        self._clock = clock
        self._noted = float("-inf"), float("nan")

    def note(self, value: float) -> None:
        """It is this just now."""
        self._noted = self._clock(), value

    def __call__(self) -> float:
        """What it is, as far as it is known."""
        at, value = self._noted
        return value if self._clock() - at < self._lasts_s else float("nan")


FLAWS = Lately(CHECK_LASTS_S)
"""What is wrong with our subscription; who checks notes it here."""
SUBSCRIPTION.set_function(FLAWS)


@dataclass(frozen=True)
class Figure:
    """A metric whose values are asked for: a gauge, or a counter if its name ends in `_total`."""

    name: str
    means: str
    values: Mapping[Any, float]
    """By the values of the labels, a tuple of strings."""
    labels: tuple[str, ...] = ()

    def family(self) -> Metric:
        """As the library has it."""
        counter = self.name.endswith("_total")
        family = (CounterMetricFamily if counter else GaugeMetricFamily)(self.name, self.means, labels=self.labels)
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        return family


class Asked(Collector):
    """Figures of something outside this process, asked for when Prometheus asks, and not more often than it can bear.

    `payready_<whom>_up` says whether it answered; when it did not, its other figures are left out: old ones would lie.
    """

    def __init__(
        self, whom: str, ask: Callable[[], Iterable[Figure]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._whom = whom
        self._ask = ask
        self._clock = clock
        self._lock = threading.Lock()
        self._told: list[Metric] = []
        self._told_at = float("-inf")

    def describe(self) -> Iterator[Metric]:
        """Nothing is asked only to be registered."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """What was told last, or anew."""
        with self._lock:
            if self._clock() - self._told_at >= ASK_AGAIN_S:
                self._told = [figure.family() for figure in self._figures()]
                self._told_at = self._clock()
            return iter(self._told)

    def _figures(self) -> list[Figure]:
        try:
            figures, up = list(self._ask()), 1.0
        except Exception as error:  # noqa: BLE001 - that it cannot be asked is itself what is to be told
            log.warning("the %s cannot be asked for its figures: %s", self._whom, str(error).partition("\n")[0])
            figures, up = [], 0.0
        return [Figure(f"payready_{self._whom}_up", f"1 if the {self._whom} answered.", {(): up}), *figures]


def ask(whom: str, question: Callable[[], Iterable[Figure]]) -> None:
    """Have Prometheus told what `question` says of `whom`."""
    REGISTRY.register(Asked(whom, question))


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Silent(WSGIRequestHandler):
    timeout = 10  # a connection on which nothing comes holds its thread no longer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is prescribed
        """A line a scrape would be too many."""


def serve(host: str, port: int, ready: Callable[[], bool] = lambda: True) -> int | None:
    """Tell `/metrics`, `/healthz` (the process lives) and `/readyz` (it does its work) to whoever asks on this port.

    Returns the port that is listened on. None if it cannot be: that is logged, and is no reason not to work.
    """
    metrics = make_wsgi_app()

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics(environ, start_response)
        status = {"/healthz": "200 OK", "/readyz": "200 OK" if ready() else "503 Service Unavailable"}
        said = status.get(path, "404 Not Found")
        start_response(said, [("Content-Type", "text/plain")])
        return [said.encode()]

    try:
        server = make_server(host, port, answer, server_class=_Server, handler_class=_Silent)
    except OSError as error:
        log.error("no metrics are told, %s:%s cannot be listened on: %s", host, port, error)
        return None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return int(server.server_port)
