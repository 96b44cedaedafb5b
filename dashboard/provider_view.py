"""The page Provider as values: how calls were answered, and how long their balances took. Pure."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from dashboard.charts import Bar, BarValue, bars, highest_value
from dashboard.time_histograms import Bin, bin_label, bins, percentile
from worker.ledger.balances import RejectionReason
from worker.ledger.provider_report import CallSample, SampledCall
from worker.rules.decimals import count_text
from worker.rules.pricing import ACCEPTED_STATUS
from worker.rules.states import IN_FLIGHT_STATES, RefreshState

SPANS: Mapping[str, timedelta] = {
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
    "week": timedelta(days=7),
}
"""Spans that the page can show, by the value of its parameter `span`."""
PERCENTILES = (50, 95, 99)
RESPONSES: Mapping[str, str] = {
    "accepted": "202: Quiltt sends a balance, and bills the call",
    "rejected": "Quiltt will not refresh this account",
    "rate_limited": "429: too many calls, repeated later",
    "not_sent": "nothing was sent, repeated later",
    "unknown": "the response was lost, so the call may have been accepted and billed",
    "in_progress": "the response is awaited",
}
"""What each result of a call means. The others than `in_progress` are those of `payready_provider_calls_total`."""
MAY_BRING_BALANCE = frozenset({"accepted", "unknown"})
"""Results of a call that its refresh's balance may come from. After the others, a refresh makes another call."""
RATE_LIMITED_STATUS = 429


@dataclass(frozen=True, kw_only=True)
class SpanFigures:
    """What was read about a span."""

    since: datetime
    until: datetime
    sample: CallSample
    rejected_balances: Mapping[RejectionReason, int]
    """Rejected balances by reason: all of the span, not a sample."""


class SpanView:
    """What the template shows of a span."""

    def __init__(self, name: str, figures: SpanFigures) -> None:
        self.name = name
        self.figures = figures
        calls = figures.sample.calls
        self.call_count = len(calls)
        self.total = figures.sample.total
        self.is_complete = figures.sample.is_complete
        accepted = [call for call in calls if call_result(call) in MAY_BRING_BALANCE]
        received = [(call, call.received_at) for call in accepted if call.received_at is not None]
        self.durations_s = sorted((at - call.called_at).total_seconds() for call, at in received)
        self.percentiles = {percent: percentile(self.durations_s, percent) for percent in PERCENTILES}
        self.polled_count = sum(call.is_polled for call, _ in received)
        self.balance_count = len(received)
        self.without_balance_count = sum(
            call.received_at is None and call.refresh_state not in IN_FLIGHT_STATES for call in accepted
        )
        results = Counter(call_result(call) for call in calls)
        self.responses = [(result, RESPONSES[result], results[result]) for result in RESPONSES if results[result]]

    @property
    def bins(self) -> list[Bin]:
        """Durations from call to balance, by bin."""
        return bins(self.durations_s)

    @property
    def bars(self) -> list[Bar]:
        """The histogram."""
        return bars(self._bar_values, height=150, gap_ratio=0.12)

    @property
    def highest(self) -> int:
        """Balances in the highest bar."""
        return highest_value(self._bar_values)

    @property
    def _bar_values(self) -> list[BarValue]:
        return [
            BarValue(value=each.count, label=f"{bin_label(each)}: {count_text(each.count, 'balance')}")
            for each in self.bins
        ]


def call_result(call: SampledCall) -> str:
    """Return how the call ended, by the evidence of its final fee entry."""
    evidence = call.evidence or {}
    if "not_sent" in evidence:
        return "not_sent"
    status = evidence.get("status")
    if status is None:
        return "in_progress" if call.refresh_state == RefreshState.CALLING else "unknown"
    return {ACCEPTED_STATUS: "accepted", RATE_LIMITED_STATUS: "rate_limited"}.get(status, "rejected")
