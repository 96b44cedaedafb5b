"""What `payment show`, `payment end-hold` and `doctor` say about rejected balances and funds holds."""

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from config.settings import settings
from tests.cli.conftest import NOON, LedgerBuilder
from worker.ledger import balance_report, funds_holds, metrics_queries, refreshes
from worker.ledger.engine import read_snapshot, transaction
from worker.rules.funds import HOLD_OPEN
from worker.rules.pricing import EntryState
from worker.rules.states import PaymentState, RefreshEvent

pytestmark = pytest.mark.slow

Run = Callable[..., Any]
TEN = Decimal("10.00")


def second(seconds: float) -> datetime:
    """Return a time after noon."""
    return NOON + timedelta(seconds=seconds)


@pytest.fixture
def run(ledger: LedgerBuilder, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command on the ledger, without a broker."""
    monkeypatch.setenv("PAYREADY_DATABASE_URL", ledger.url)
    monkeypatch.setenv("PAYREADY_REDIS_URL", "redis://127.0.0.1:1/0")
    for module in ("payment_actions", "payment_reports", "command_line", "command_runtime"):
        monkeypatch.setattr(f"cli.{module}.settings", settings.__wrapped__)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.fixture
def failed(ledger: LedgerBuilder) -> LedgerBuilder:
    """Insert a payment with a call after 1 s that timed out after 120 s."""
    ledger.payment("pay_1", "acct_a", amount=TEN, max_balance_age_s=30)
    ledger.call("ref_a", "acct_a", EntryState.POSTED, second(1))
    ledger.resolve("pay_1", PaymentState.FAILED, second(121), reason="timeout", refresh_id="ref_a")
    return ledger


def shown(run: Run, payment_id: str = "pay_1") -> dict[str, Any]:
    """Return the JSON of `payment show`."""
    return dict(json.loads(run("payment", "show", payment_id, "--json").output))


def test_balance_too_old_for_its_payment_is_shown_with_both_times(run: Run, failed: LedgerBuilder) -> None:
    """The text has the time as of which the balance is believed, and the time that the payment needs."""
    failed.balance("bal_old", "acct_a", second(-120), TEN, received_at=second(4), refresh_id="ref_a")
    [line] = shown(run)["rejected_balances"]
    assert (line["reason"], line["balance"]["balance_id"]) == ("too_old", "bal_old")
    assert line["balance"]["as_of"] == "2026-11-22T11:58:00Z"
    assert line["detail"] == "as of 2026-11-22T11:58:00Z, the payment needs 2026-11-22T11:59:30Z or later"
    output = run("payment", "show", "pay_1").output
    assert "balance rejected" in output
    assert f"balance bal_old rejected as too_old: {line['detail']}" in output


def test_balance_after_the_deadline_is_shown_as_late(run: Run, failed: LedgerBuilder) -> None:
    """It answers the payment's call, so it is shown although it arrived after the resolution."""
    failed.balance("bal_late", "acct_a", second(124), TEN, refresh_id="ref_a")
    failed.balance("bal_other", "acct_a", second(125), TEN, refresh_id="ref_b")
    [line] = shown(run)["rejected_balances"]
    assert (line["balance"]["balance_id"], line["reason"]) == ("bal_late", "after_deadline")
    assert (
        "balance bal_late rejected as after_deadline: arrived 4.000 s after the deadline"
        in run("payment", "show", "pay_1").output
    )


def test_balance_of_earlier_call_is_too_old_for_payment_that_accepts_no_age(run: Run, ledger: LedgerBuilder) -> None:
    """Its time alone would be fresh enough."""
    ledger.call("ref_before", "acct_a", EntryState.POSTED, second(-1))
    ledger.payment("pay_1", "acct_a", max_balance_age_s=0)
    ledger.balance("bal_before", "acct_a", second(2), TEN, refresh_id="ref_before")
    [line] = shown(run)["rejected_balances"]
    assert (line["reason"], line["detail"]) == (
        "too_old",
        "of no call at 2026-11-22T12:00:00Z or later, which the payment needs",
    )


def test_balance_of_no_call_is_listed_as_unattributed(run: Run, ledger: LedgerBuilder) -> None:
    """A balance that another system requested looks like this. Balances of other sources are left out."""
    ledger.payment("pay_1", "acct_a")
    ledger.balance("bal_foreign", "acct_a", second(2), TEN)
    ledger.balance("bal_sync", "acct_a", second(3), TEN, source="SYNC")
    ledger.balance("bal_other", "acct_b", second(3), TEN)
    result = shown(run)
    assert [line["balance_id"] for line in result["unattributed_balances"]] == ["bal_foreign"]
    assert result["rejected_balances"] == []
    output = run("payment", "show", "pay_1").output
    assert "available 10.00, as of 2026-11-22 12:00:02Z, attributed to no call" in output
    assert "bal_sync" not in output


def test_balances_before_request_and_fresh_ones_are_not_rejected(run: Run, failed: LedgerBuilder) -> None:
    """Only what the payment could not use is listed."""
    failed.balance("bal_before", "acct_a", second(-100), TEN, refresh_id="ref_x")
    failed.balance("bal_fresh", "acct_a", second(3), TEN, refresh_id="ref_a")
    assert shown(run)["rejected_balances"] == []


def test_balance_dated_ahead_is_shown_with_both_times(run: Run, ledger: LedgerBuilder) -> None:
    """It is believed as of its arrival."""
    ledger.payment("pay_1", "acct_a")
    ledger.balance("bal_ahead", "acct_a", second(600), TEN, received_at=second(2), is_applied=False)
    expected = "as of 2026-11-22 12:00:02Z, its own time 2026-11-22 12:10:00Z"
    assert expected in run("payment", "show", "pay_1").output


def release(ledger: LedgerBuilder, hold_until: datetime | None = HOLD_OPEN, **job: Any) -> None:
    """Insert a released payment of 10.00."""
    ledger.payment("pay_1", "acct_a", amount=TEN, **job)
    outcome = {"verdict": "sufficient"}
    ledger.resolve("pay_1", PaymentState.RELEASED, second(3), outcome=outcome, hold_until=hold_until)


def test_funds_hold_of_undelivered_outcome_is_shown_as_duration(run: Run, ledger: LedgerBuilder) -> None:
    """The job's `hold_s`, or the setting, counts from the delivery."""
    release(ledger, hold_s=600)
    assert shown(run)["funds_hold"] == {"until": None, "after_delivery_s": 600}
    assert "funds hold: 10.00 USD until 600 s after the outcome is delivered" in run("payment", "show", "pay_1").output


def test_funds_hold_of_delivered_outcome_is_shown_with_its_end(run: Run, ledger: LedgerBuilder) -> None:
    release(ledger)
    with transaction(ledger.engine) as tx:
        funds_holds.start_hold_countdown(tx, {"task-pay_1": second(4)}, 86_400)
    assert shown(run)["funds_hold"] == {"until": "2026-11-23T12:00:04Z", "after_delivery_s": 86_400}
    assert "funds hold: 10.00 USD" in run("payment", "show", "pay_1").output


def test_calculation_of_version_0_2_0_is_shown_with_old_and_new_names(run: Run, ledger: LedgerBuilder) -> None:
    """A program that reads the old names continues to work with new payments too."""
    names = {"amount": "10.00", "needed": "10.00", "available": "60.00", "currency": "USD"}
    old = {**names, "released_since_balance": "50.00", "released_count": 2, "available_after_releases": "10.00"}
    new = {**names, "held": "50.00", "held_count": 2, "held_until": None, "available_after_holds": "10.00"}
    for payment_id, calculation in (("pay_old", old), ("pay_new", new)):
        ledger.payment(payment_id, "acct_a", amount=TEN)
        outcome = {"verdict": "sufficient"}
        ledger.resolve(payment_id, PaymentState.RELEASED, second(3), outcome=outcome, funds_calculation=calculation)
    old_shown, new_shown = (shown(run, payment_id)["funds_calculation"] for payment_id in ("pay_old", "pay_new"))
    assert new_shown == {**old_shown, "held_until": None}
    expected = "available 10.00 USD = 60.00 balance - 50.00 held for 2 payments"
    assert f"{expected}\n" in run("payment", "show", "pay_old").output
    assert f"{expected}, outcome not delivered yet" in run("payment", "show", "pay_new").output


def test_failed_payment_has_no_funds_hold(run: Run, failed: LedgerBuilder) -> None:
    assert shown(run)["funds_hold"] is None
    assert "funds hold" not in run("payment", "show", "pay_1").output


def test_end_hold_ends_the_funds_hold_once(run: Run, ledger: LedgerBuilder) -> None:
    """The second time it fails with status 1, because nothing is left to end."""
    release(ledger)
    first = run("payment", "end-hold", "pay_1")
    assert (first.exit_code, first.output.startswith("pay_1: funds hold ended")) == (0, True)
    until = datetime.fromisoformat(shown(run)["funds_hold"]["until"])
    assert until < HOLD_OPEN
    assert "funds hold: 10.00 USD ended" in run("payment", "show", "pay_1").output
    second_time = run("payment", "end-hold", "pay_1", "--json")
    assert (second_time.exit_code, json.loads(second_time.stdout)) == (1, {"payment_id": "pay_1", "ended": False})


@pytest.mark.parametrize("payment_id", ["pay_unknown", "pay_1"])
def test_end_hold_fails_without_a_funds_hold(run: Run, failed: LedgerBuilder, payment_id: str) -> None:
    """For an unknown payment and for one that is not released."""
    result = run("payment", "end-hold", payment_id)
    assert result.exit_code == 1
    assert f"{payment_id} has no funds hold to end" in result.stderr
    assert failed


def test_calls_with_a_rejected_balance_are_not_counted_as_calls_without_balance(ledger: LedgerBuilder) -> None:
    """Of two accepted calls, one got a balance that was rejected. Old rejections are not counted."""
    for name in ("a", "b"):
        ledger.call(f"ref_{name}", f"acct_{name}", EntryState.POSTED, second(1))
        with transaction(ledger.engine) as tx:
            record = refreshes.find(tx, f"ref_{name}")
            assert record
            refreshes.transition(tx, record, RefreshEvent.ACCEPT, second(61))
    ledger.balance("bal_1", "acct_a", second(-99), TEN, received_at=second(4), refresh_id="ref_a", rejected="too_old")
    ledger.balance("bal_2", "acct_a", second(-90_000), TEN, refresh_id="ref_a", rejected="too_old")
    with read_snapshot(ledger.engine) as tx:
        unanswered = metrics_queries.call_counts_by_refresh_state(tx, second(0), second(60))
        rejected = balance_report.count_unanswered_calls_with_rejected_balance(tx, second(0), second(60))
        counts = balance_report.rejected_counts(tx, second(-3600))
    assert sum(unanswered[state] for state in balance_report.UNANSWERED_STATES if state in unanswered) == 2
    assert rejected == 1
    assert counts == {"too_old": 1}
