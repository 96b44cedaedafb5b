"""The page Provider: percentiles, responses, lost and late balances, and samples of busy ledgers."""

import math
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest
from sqlalchemy import insert

from dashboard.time_histograms import bins, percentile
from tests.dashboard.test_now_page import visible_text
from worker.ledger import balance_report, provider_report
from worker.ledger.engine import read_snapshot, transaction
from worker.ledger.tables import BALANCE, FEE_ENTRY, REFRESH
from worker.runtime import Runtime

ACCEPTED = ("posted", {"status": 202})


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
