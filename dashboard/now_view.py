"""The page Now as values: the picture of waiting payments, the outcomes of an hour, and what needs attention. Pure."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from dashboard.charts import Bar, BarValue, DeadlineScale, Tick, bars, highest_value, lane_of
from dashboard.page_links import payments_path
from dashboard.page_rendering import duration_text
from dashboard.slow_figures import SlowFigures
from worker.correlation.admission import AdmissionStatus
from worker.errors import FailureReason
from worker.ledger.metrics_queries import NO_REFRESH, Backlog
from worker.ledger.now_report import WaitingPaymentLine
from worker.ledger.payment_search import DeliveryProblem
from worker.rules.decimals import count_text
from worker.rules.explanations import WAITING
from worker.rules.failure_explanations import FAILURES
from worker.rules.fee_caps import WARNING_THRESHOLD, CapKind
from worker.rules.payment_situations import Actor
from worker.rules.states import PaymentState, RefreshState

MAX_MARKS = 300
"""How many waiting payments have a mark of their own, those with the earliest deadlines."""
STRIP_BARS = 47
"""Bars of the strip that counts all waiting payments: one each 2 % of the picture's width, up to the deadline."""
SOON_S = 15.0
"""Time left from which a mark warns."""
BAND_HEIGHT, BAND_LABEL_HEIGHT, LANES = 84, 24, 6
BANDS: Mapping[str, Sequence[str]] = {
    "the call is not made yet": (NO_REFRESH, RefreshState.REQUESTED),
    "called, the balance is awaited": (RefreshState.CALLING, RefreshState.ACCEPTED),
    "the response was lost, or no balance came": (RefreshState.UNCERTAIN, RefreshState.UNANSWERED),
}
"""Rows of the picture, each with the refresh states of its payments."""
STATE_LABELS: Mapping[str, str] = {
    NO_REFRESH: "no refresh yet",
    RefreshState.REQUESTED: "call to be made",
    RefreshState.CALLING: "call in progress",
    RefreshState.ACCEPTED: "call accepted, balance awaited",
    RefreshState.UNCERTAIN: "response lost",
    RefreshState.UNANSWERED: "no balance came in time",
}
OVERDUE_GRACE = timedelta(seconds=15)
UNDELIVERED_GRACE = timedelta(seconds=60)
UNAPPLIED_GRACE = timedelta(seconds=30)
"""Ages from which the alert rules count the three as a problem."""
REASONS_TO_ACT_ON = (FailureReason.NOT_AUTHORIZED, FailureReason.FEE_CAP_REACHED)
"""Failures that repeat until an operator acts."""


@dataclass(frozen=True, kw_only=True)
class NowFigures:
    """What was read at one moment."""

    now: datetime
    backlog: Backlog
    scale: DeadlineScale
    first_waiting: Sequence[WaitingPaymentLine]
    strip_counts: Sequence[int]
    """Waiting payments by the bars of the strip, from the longest time left; the last count is of overdue ones."""
    outcomes_by_minute: Mapping[datetime, Mapping[tuple[str, str], int]]
    """Resolved payments of an hour by minute, then by state and reason."""
    dead_letter_count: int
    quarantined_count: int
    admission: Sequence[AdmissionStatus] | None
    """Status of each announced API key. None if Redis is unavailable."""
    slow: SlowFigures


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A waiting payment in the picture."""

    payment: WaitingPaymentLine
    number: int
    percent: float
    y: float
    kind: str
    left_s: float
    waited_s: float


@dataclass(frozen=True, kw_only=True)
class Band:
    """A row of the picture."""

    label: str
    top: float
    count: int


@dataclass(frozen=True, kw_only=True)
class WaitingGroup:
    """Waiting payments whose refresh has one state."""

    label: str
    count: int
    oldest_wait_s: float
    actor: Actor


@dataclass(frozen=True, kw_only=True)
class OutcomeGroup:
    """Payments resolved in the last hour with one result."""

    state: str
    reason: str
    count: int
    actor: Actor
    path: str
    """Page that lists them."""


@dataclass(frozen=True, kw_only=True)
class AttentionItem:
    """Something that needs attention."""

    text: str
    actor: Actor
    path: str
    """Page where it is acted on."""


class NowView:
    """What the template of the page shows."""

    def __init__(self, figures: NowFigures) -> None:
        self.figures = figures
        self.height = BAND_HEIGHT * len(BANDS)
        self.ticks: list[Tick] = figures.scale.ticks()
        self.marks = [self._mark(payment) for payment in figures.first_waiting]
        self.bands = [
            Band(label=label, top=number * BAND_HEIGHT, count=sum(self._waiting(state) for state in states))
            for number, (label, states) in enumerate(BANDS.items())
        ]
        self.strip = self._strip_bars()
        self.attention = list(_attention(self))
        self.minutes = list(self._minute_values())
        self.minute_bars = bars(self.minutes, height=90)
        self.highest_minute = highest_value(self.minutes)
        self.outcomes = self._outcome_groups()
        self.groups = list(self._waiting_groups())

    @property
    def oldest_wait_s(self) -> float:
        """Longest wait of a waiting payment."""
        return max((group.oldest_wait_s for group in self.groups), default=0.0)

    @property
    def first_left_s(self) -> float | None:
        """Time left until the first deadline."""
        first = self.figures.backlog.first_deadline
        return None if first is None else (first - self.figures.now).total_seconds()

    @property
    def hour(self) -> dict[str, str]:
        """The conditions of a search for the payments of `outcomes`."""
        bounds = min(self.figures.outcomes_by_minute, default=self.figures.now), self.figures.now
        since, until = (at.isoformat().replace("+00:00", "Z") for at in bounds)
        return {"resolved_since": since, "resolved_until": until}

    @property
    def resolved_count(self) -> int:
        """Payments resolved in the last hour."""
        return sum(group.count for group in self.outcomes)

    def count_of(self, state: PaymentState) -> int:
        """Return how many payments of the last hour have this state."""
        return sum(group.count for group in self.outcomes if group.state == state)

    def _waiting(self, refresh: str) -> int:
        group = self.figures.backlog.waiting.get(refresh)
        return group.count if group else 0

    def _mark(self, payment: WaitingPaymentLine) -> Mark:
        left_s = (payment.deadline - self.figures.now).total_seconds()
        band = next(number for number, states in enumerate(BANDS.values()) if payment.refresh in states)
        lane = lane_of(payment.payment_id, LANES)
        lane_height = (BAND_HEIGHT - BAND_LABEL_HEIGHT - 4) / LANES
        return Mark(
            payment=payment,
            number=lane_of(payment.payment_id, 2**32),
            percent=self.figures.scale.percent(left_s),
            y=round(band * BAND_HEIGHT + BAND_LABEL_HEIGHT + (lane + 0.5) * lane_height, 1),
            kind="late" if left_s < 0 else "soon" if left_s < SOON_S else "calm",
            left_s=left_s,
            waited_s=(self.figures.now - payment.requested_at).total_seconds(),
        )

    def _strip_bars(self) -> list[Bar]:
        edges = strip_edges_s(self.figures.scale)
        ends = ["more time left", *(f"{duration_text(left_s)} left or less" for left_s in edges[:-1]), "overdue"]
        values = [
            BarValue(value=count, label=f"{count_text(count, 'payment')}: {end}")
            for count, end in zip(self.figures.strip_counts, ends, strict=True)
        ]
        return bars(values, height=56, gap_ratio=0.12, width_percent=2.0 * len(values))

    def _minute_values(self) -> Iterator[BarValue]:
        for minute, counts in self.figures.outcomes_by_minute.items():
            by_state: Counter[str] = Counter()
            for (state, _), count in counts.items():
                by_state[state] += count
            released, failed = by_state[PaymentState.RELEASED], by_state[PaymentState.FAILED]
            label = f"{minute:%H:%M} UTC: {released} released, {failed} failed"
            yield BarValue(value=released, upper=failed, label=label)

    def _outcome_groups(self) -> list[OutcomeGroup]:
        totals: Counter[tuple[str, str]] = Counter()
        for counts in self.figures.outcomes_by_minute.values():
            totals.update(counts)
        return [
            _outcome_group(state, reason, count, self.hour)
            for (state, reason), count in sorted(totals.items(), key=lambda item: (-item[1], item[0]))
        ]

    def _waiting_groups(self) -> Iterator[WaitingGroup]:
        for state, label in STATE_LABELS.items():
            group = self.figures.backlog.waiting.get(state)
            if group is None or group.oldest_at is None:
                continue
            yield WaitingGroup(
                label=label,
                count=group.count,
                oldest_wait_s=max(0.0, (self.figures.now - group.oldest_at).total_seconds()),
                actor=WAITING[None if state == NO_REFRESH else RefreshState(state)].actor,
            )


def strip_edges_s(scale: DeadlineScale) -> list[float]:
    """Return the times left at the edges of the strip's bars, from the longest: each bar ends at one."""
    return [scale.left_s(2.0 * number) for number in range(1, STRIP_BARS)] + [0.0]


def _outcome_group(state: str, reason: str, count: int, times: Mapping[str, str]) -> OutcomeGroup:
    if state == PaymentState.RELEASED:
        path = payments_path(state=state, **times)
        return OutcomeGroup(state=state, reason="", count=count, actor=Actor.NONE, path=path)
    actor = FAILURES[FailureReason(reason)].actor
    return OutcomeGroup(
        state=state, reason=reason, count=count, actor=actor, path=payments_path(reason=reason, **times)
    )


def _attention(view: NowView) -> Iterator[AttentionItem]:
    """Yield what needs attention, the most urgent first."""
    figures, backlog = view.figures, view.figures.backlog
    if backlog.first_deadline is not None and figures.now - backlog.first_deadline > OVERDUE_GRACE:
        text = "Payments wait past their deadline: check that `beat` and `worker` run."
        yield AttentionItem(text=text, actor=Actor.US, path=payments_path(state="waiting"))
    if figures.admission is None:
        yield AttentionItem(text="Redis does not respond.", actor=Actor.US, path="#limits")
    yield from _breaker_items(figures.admission or ())
    yield from _backlog_items(figures)
    for reason in REASONS_TO_ACT_ON:
        if count := _failed_count(figures, reason):
            explained = FAILURES[reason]
            text = f"{count_text(count, 'payment')} failed in the last hour with reason {reason}: {explained.action}."
            yield AttentionItem(text=text, actor=explained.actor, path=payments_path(reason=reason, **view.hour))
    yield from _stored_items(figures)


def _breaker_items(admission: Sequence[AdmissionStatus]) -> Iterator[AttentionItem]:
    for status in admission:
        if status.breaker == "open":
            text = "Calls to Quiltt fail, so the circuit breaker is open: no calls are made until it closes."
            yield AttentionItem(text=text, actor=Actor.QUILTT, path="/provider")
        elif status.breaker == "half_open":
            text = "Calls to Quiltt failed: the circuit breaker is half-open, and the next call is a probe."
            yield AttentionItem(text=text, actor=Actor.QUILTT, path="/provider")


def _backlog_items(figures: NowFigures) -> Iterator[AttentionItem]:
    backlog, now = figures.backlog, figures.now
    if backlog.undeliverable_count:
        text = f"{count_text(backlog.undeliverable_count, 'outcome')} undeliverable: correct the cause, then redeliver."
        yield AttentionItem(text=text, actor=Actor.US, path=payments_path(delivery=DeliveryProblem.UNDELIVERABLE))
    if backlog.undelivered.oldest_at is not None and now - backlog.undelivered.oldest_at > UNDELIVERED_GRACE:
        text = f"{count_text(backlog.undelivered.count, 'outcome')} not delivered: check the broker and `worker`."
        yield AttentionItem(text=text, actor=Actor.US, path=payments_path(delivery=DeliveryProblem.UNDELIVERED))
    if backlog.unapplied.oldest_at is not None and now - backlog.unapplied.oldest_at > UNAPPLIED_GRACE:
        text = f"{count_text(backlog.unapplied.count, 'received balance')} not applied: check that `worker` runs."
        yield AttentionItem(text=text, actor=Actor.US, path="#deliveries")


def _stored_items(figures: NowFigures) -> Iterator[AttentionItem]:
    if count := figures.dead_letter_count:
        text = f"{count_text(count, 'dead letter')}: requeue or delete."
        yield AttentionItem(text=text, actor=Actor.US, path="/dead-letters")
    if count := figures.quarantined_count:
        text = f"{count_text(count, 'event')} in quarantine: replay or delete."
        yield AttentionItem(text=text, actor=Actor.US, path="/quarantine")
    for use in figures.slow.cap_uses:
        if use.ratio >= WARNING_THRESHOLD:
            period = "day" if use.cap == CapKind.DAY else "month"
            text = f"The fee cap of the {period} is used to {use.ratio:.0%}."
            yield AttentionItem(text=text, actor=Actor.US, path="/fees")
    if count := len(figures.slow.unresolved_at):
        text = f"{count_text(count, 'call')} unresolved for a day: reconcile Quiltt's invoice."
        yield AttentionItem(text=text, actor=Actor.US, path="/fees/pending")


def _failed_count(figures: NowFigures, reason: FailureReason) -> int:
    key = (PaymentState.FAILED.value, reason.value)
    return sum(counts.get(key, 0) for counts in figures.outcomes_by_minute.values())
