"""Reading of the page Provider: a span is read once in a while for all browsers."""

import threading

from dashboard.provider_view import SPANS, SpanFigures, SpanView
from worker.ledger import balance_report, provider_report
from worker.ledger.engine import read_snapshot
from worker.ledger.metrics_queries import set_short_timeout
from worker.runtime import Runtime

MAX_AGE_RATIO = 120
"""Figures are shown until they are as old as this part of their span: an hour for 30 s."""


class ProviderReader:
    """Reads how the provider responds. Threads share it."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt
        self._lock = threading.Lock()
        self._views: dict[str, SpanView] = {}

    def views(self) -> dict[str, SpanView]:
        """Return the view of each span. Raise one of `DATABASE_UNAVAILABLE`."""
        with self._lock:
            for name in SPANS:
                if self._is_old(name):
                    self._views[name] = SpanView(name, self._read(name))
            return dict(self._views)

    def _is_old(self, name: str) -> bool:
        view = self._views.get(name)
        return view is None or self._rt.clock() - view.figures.until > SPANS[name] / MAX_AGE_RATIO

    def _read(self, name: str) -> SpanFigures:
        now = self._rt.clock()
        since = now - SPANS[name]
        with read_snapshot(self._rt.engine) as tx:
            set_short_timeout(tx)
            return SpanFigures(
                since=since,
                until=now,
                sample=provider_report.sample_calls(tx, since, now),
                rejected_balances=balance_report.rejected_counts(tx, since),
            )
