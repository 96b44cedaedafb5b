"""Reading of the page Provider: a span is read in the background, once in a while for all browsers."""

from collections.abc import Iterable, Mapping
from functools import partial

from dashboard.background_read import BackgroundRead
from dashboard.provider_view import SPANS, SpanFigures, SpanView
from worker.ledger import balance_report, provider_report
from worker.ledger.engine import read_snapshot
from worker.ledger.metrics_queries import set_short_timeout
from worker.runtime import Runtime

REREAD_RATIO = 120
"""Figures are read again when they are as old as this part of their span: an hour after 30 s."""
HIDE_RATIO = 12
"""Figures are not shown when they are as old as this part of their span: an hour after 5 min."""


class ProviderReader:
    """Reads how the provider responds. Threads share it."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt
        self._background = BackgroundRead("provider")
        self._views: Mapping[str, SpanView] = {}

    def prepare(self) -> None:
        """Read all spans now. Raise one of `DATABASE_UNAVAILABLE`."""
        self._read_spans(SPANS)

    def views(self) -> dict[str, SpanView]:
        """Return the views that are known. Those that are old are read again, which delays the caller only briefly.

        Raise one of `DATABASE_UNAVAILABLE` if not all are known, because the last read failed.
        """
        old = [name for name in SPANS if self._is_older(name, REREAD_RATIO)]
        if old:
            self._background.start(partial(self._read_spans, old))
            self._background.wait_briefly()
        known = {name: self._views[name] for name in SPANS if not self._is_older(name, HIDE_RATIO)}
        if self._background.failure is not None and len(known) < len(SPANS):
            raise self._background.failure
        return known

    def _is_older(self, name: str, ratio: int) -> bool:
        view = self._views.get(name)
        return view is None or self._rt.clock() - view.figures.until > SPANS[name] / ratio

    def _read_spans(self, names: Iterable[str]) -> None:
        for name in names:
            self._views = {**self._views, name: SpanView(name, self._read(name))}

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
