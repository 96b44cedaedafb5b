"""The page Provider: percentiles, responses, lost and late balances, and samples of busy ledgers."""

import math
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest
from sqlalchemy import insert
from sqlalchemy.exc import OperationalError

from config.clock import utc_now
from dashboard import background_read
from dashboard.provider_view import SPANS
from dashboard.time_histograms import bins, percentile
from tests.dashboard.test_now_page import visible_text
from worker.ledger import balance_report, provider_report
from worker.ledger.engine import Tx, read_snapshot, transaction
from worker.ledger.tables import BALANCE, FEE_ENTRY, REFRESH
from worker.runtime import Runtime

ACCEPTED = ("posted", {"status": 202})


@pytest.fixture(autouse=True)
def complete_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pages wait until all spans are read."""
    monkeypatch.setattr(background_read, "PAGE_WAIT_S", 60)


class SlowSpans:
    """Reads of samples, of which those of some spans wait until they are allowed."""

    def __init__(self, spans: Sequence[str]) -> None:
        self.allowed = threading.Event()
        self._lengths = [SPANS[name] for name in spans]
        self._sample_calls = provider_report.sample_calls

    def __call__(self, tx: Tx, since: datetime, until: datetime) -> provider_report.CallSample:
        if until - since in self._lengths:
            assert self.allowed.wait(60)
        return self._sample_calls(tx, since, until)


@pytest.fixture
def slow_spans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowSpans]:
    """Let the reads of the given spans wait until the test allows them, or ends."""
    slow = SlowSpans(request.param)
    monkeypatch.setattr(provider_report, "sample_calls", slow)
    yield slow
    slow.allowed.set()


def add_call(
    runtime: Runtime,
    number: int,
    final: tuple[str, dict[str, Any]] | None,
    *,
    balance_after_s: float | None = None,
    is_polled: bool = False,
    rejected: str | None = None,
    state: str | None = None,
) -> None:
    """Insert a call made ten minutes ago, and its balance."""
    called_at = datetime.now(UTC) - timedelta(minutes=10)
    ids = {"refresh_id": f"ref{number}", "account_id": f"acct{number}"}
    entry = {
        **ids,
        "call_id": f"call{number}",
        "price": Decimal("0.1"),
        "currency": "USD",
        "price_list": "x",
        "called_at": called_at,
        "recorded_at": called_at,
    }
    with transaction(runtime.engine) as tx:
        state = state or ("unanswered" if balance_after_s is None else "answered")
        tx.execute(insert(REFRESH).values(**ids, state=state, called_at=called_at))
        tx.execute(insert(FEE_ENTRY).values(**entry, state="pending", evidence={}))
        if final:
            tx.execute(insert(FEE_ENTRY).values(**entry, state=final[0], evidence=final[1]))
        if balance_after_s is not None:
            at = called_at + timedelta(seconds=balance_after_s)
            event_id = f"poll:{number}" if is_polled else f"evt{number}"
            row = {"balance_id": f"bal{number}", "event_id": event_id, "at": at, "received_at": at, "source": "REFRESH"}
            tx.execute(insert(BALANCE).values(**ids, **row, rejected=rejected))


def test_page_shows_times_responses_and_lost_balances(runtime: Runtime, operator: httpx.Client) -> None:
    for number, seconds in enumerate((1, 2, 4, 8)):
        add_call(runtime, number, ACCEPTED, balance_after_s=seconds, is_polled=number == 3)
    add_call(runtime, 4, ACCEPTED)
    add_call(runtime, 5, ("void", {"status": 404}))
    add_call(runtime, 6, ("void", {"status": 429}))
    add_call(runtime, 7, ("void", {"not_sent": "refused"}))
    add_call(runtime, 8, None)
    page = visible_text(operator.get("/provider").text)
    assert "p50 2.0 s 2.0 s 2.0 s" in page
    assert "p99 8.0 s 8.0 s 8.0 s" in page
    assert "From all 9 calls" in page
    assert "found by polling 1 of 4 balances (25.0 %)" in page
    assert "no balance 2 of 9 calls (22.2 %)" in page
    for result, count in {"accepted": 5, "rejected": 1, "rate_limited": 1, "not_sent": 1, "unknown": 1}.items():
        start = page.index(f"{result} ", page.index("Responses to calls"))
        assert f" {count} {100 * count / 9:.1f} %" in page[start : start + 120]


def test_balance_of_a_repeated_call_is_not_that_of_the_first(runtime: Runtime, operator: httpx.Client) -> None:
    """A refresh whose call was not accepted makes another call, which brings the balance."""
    add_call(runtime, 1, ACCEPTED, balance_after_s=2)
    add_call(runtime, 2, ("void", {"status": 429}), balance_after_s=200)
    add_call(runtime, 3, ("void", {"not_sent": "refused"}), balance_after_s=200)
    page = visible_text(operator.get("/provider").text)
    assert "p99 2.0 s 2.0 s 2.0 s" in page
    assert "found by polling 0 of 1 balance (" in page


def test_call_in_progress_has_no_lost_response(runtime: Runtime, operator: httpx.Client) -> None:
    add_call(runtime, 1, None, state="calling")
    page = visible_text(operator.get("/provider").text)
    assert "in_progress the response is awaited 1 100.0 %" in page
    assert "the response was lost" not in page


def test_rejected_balances_are_those_of_the_report(runtime: Runtime, operator: httpx.Client) -> None:
    add_call(runtime, 1, ACCEPTED, balance_after_s=3, rejected="too_old")
    add_call(runtime, 2, ACCEPTED, balance_after_s=3, rejected="after_deadline")
    add_call(runtime, 3, ACCEPTED, balance_after_s=3, rejected="too_old")
    with read_snapshot(runtime.engine) as tx:
        counts = balance_report.rejected_counts(tx, datetime.now(UTC) - timedelta(hours=1))
    page = visible_text(operator.get("/provider").text)
    assert f"rejected, too old {counts['too_old']} balances, of all calls" in page
    assert f"rejected, too late {counts['after_deadline']} balance, of all calls" in page
    assert counts == {"too_old": 2, "after_deadline": 1}


def test_one_call_is_counted_in_the_singular(runtime: Runtime, operator: httpx.Client) -> None:
    add_call(runtime, 1, ACCEPTED, balance_after_s=3)
    page = visible_text(operator.get("/provider").text)
    assert "From 1 call. As of" in page
    assert "0 of 1 balance (0.0 %)" in page
    assert "0 of 1 call (0.0 %)" in page


def test_many_calls_are_sampled_and_the_page_says_so(
    runtime: Runtime, operator: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider_report, "SAMPLED_RUNS", 5)
    monkeypatch.setattr(provider_report, "RUN_LENGTH", 4)
    monkeypatch.setattr(provider_report, "SAMPLED_ENTRIES", 20)
    for number in range(60):
        add_call(runtime, number, ACCEPTED, balance_after_s=3)
    page = visible_text(operator.get("/provider?span=week").text)
    assert "From a sample of 10 of about 60 calls, spread evenly" in page


@pytest.mark.parametrize("slow_spans", [["day", "week"]], indirect=True)
def test_page_does_not_wait_for_slow_spans(
    runtime: Runtime, operator: httpx.Client, slow_spans: SlowSpans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says which are missing, and shows the others."""
    add_call(runtime, 1, ACCEPTED, balance_after_s=2)
    monkeypatch.setattr(background_read, "PAGE_WAIT_S", 0.01)
    while "The figures of the last day, week are still being read" not in visible_text(operator.get("/provider").text):
        pass  # the hour is being read, too
    page = visible_text(operator.get("/provider?span=week").text)
    assert "p50 2.0 s – –" in page
    assert "not yet not yet" in page
    assert "Responses to calls" not in page
    slow_spans.allowed.set()
    monkeypatch.setattr(background_read, "PAGE_WAIT_S", 60)
    page = visible_text(operator.get("/provider?span=week").text)
    assert "still being read" not in page
    assert "p50 2.0 s 2.0 s 2.0 s" in page


@pytest.mark.parametrize("slow_spans", [[]], indirect=True)
def test_old_figures_are_shown_with_their_age_and_very_old_ones_are_not(
    runtime: Runtime, operator: httpx.Client, slow_spans: SlowSpans, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_call(runtime, 1, ACCEPTED, balance_after_s=2)
    read_at = utc_now()
    runtime.clock = lambda: read_at
    assert "read 0 ms ago 0 ms ago 0 ms ago" in visible_text(operator.get("/provider").text)
    monkeypatch.setattr(background_read, "PAGE_WAIT_S", 0.01)
    monkeypatch.setattr(slow_spans, "_lengths", list(SPANS.values()))
    runtime.clock = lambda: read_at + timedelta(minutes=1)
    page = visible_text(operator.get("/provider").text)
    assert "read 1 min 0 s ago 1 min 0 s ago 1 min 0 s ago" in page
    assert "p50 2.0 s 2.0 s 2.0 s" in page
    runtime.clock = lambda: read_at + timedelta(minutes=10)
    page = visible_text(operator.get("/provider").text)
    assert "The figures of the last hour are still being read" in page
    assert "read not yet 10 min 0 s ago 10 min 0 s ago" in page


def test_page_without_figures_says_that_the_ledger_is_unavailable(
    operator: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> provider_report.CallSample:
        raise OperationalError("SELECT", {}, Exception("the server closed the connection"))

    with monkeypatch.context() as failing:
        failing.setattr(provider_report, "sample_calls", fail)
        response = operator.get("/provider")
    assert response.status_code == 503
    assert "the ledger is unavailable" in visible_text(response.text)
    assert "still being read" not in visible_text(operator.get("/provider").text)


@pytest.mark.parametrize("span", ["", "year", "<script>alert(1)</script>"])
def test_unknown_span_is_a_problem_of_the_page(operator: httpx.Client, span: str) -> None:
    response = operator.get("/provider", params={"span": span})
    assert response.status_code == 400
    assert "span must be one of hour, day, week" in visible_text(response.text)
    assert "<script>alert" not in response.text


def test_percentiles_and_bins_have_their_limits() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, percent) for percent in (50, 95, 99)] == [50, 95, 99]
    assert percentile([7.0], 99) == 7
    assert percentile([], 50) is None
    counted = bins([0.5, 0.6, 120.0, 120.5])
    assert [each.count for each in counted if each.count] == [1, 1, 1, 1]
    assert sum(each.count for each in bins(values)) == len(values)
    assert math.isclose(counted[0].until_s or 0, 0.5)
