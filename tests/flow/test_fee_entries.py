"""Every attempted call has an entry that was committed before it, and a final entry for its known result."""

from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal

import pytest

from tests.support.in_process import PRICES, START, InProcessSystem
from worker import flow
from worker.errors import CallFailed, CallNotSent, CallRejected, CallResultUnknown, FailureReason, RateLimited
from worker.rules.pricing import parse_price_list

A = "acct_fees"


def test_pending_entry_is_committed_before_the_call(payready: InProcessSystem) -> None:
    """During the call, another connection sees the entry with its price and price list."""
    entries: list[dict[str, object]] = []

    def read_ledger() -> int:
        entries.extend(payready.rows("SELECT state, price, currency, price_list, account_id FROM fee_entry"))
        return 202

    payready.provider.script[A] = [read_ledger]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert [(row["state"], Decimal(str(row["price"]))) for row in entries] == [("pending", Decimal("0.100000"))]
    assert (entries[0]["currency"], entries[0]["price_list"], entries[0]["account_id"]) == ("USD", "test", A)


@pytest.mark.parametrize(
    ("result", "entries"),
    [
        (202, ["1 pending", "1 posted"]),
        (CallRejected(404, FailureReason.ACCOUNT_NOT_FOUND, "unknown"), ["1 pending", "1 void"]),
        (RateLimited("rate limit", None), ["1 pending", "1 void"]),
        (CallNotSent("no connection"), ["1 pending", "1 void"]),
        (CallResultUnknown("read timeout"), ["1 pending"]),
        (CallResultUnknown("500", 500), ["1 pending"]),
    ],
)
def test_call_result_determines_the_final_entry(
    payready: InProcessSystem, result: int | CallFailed, entries: list[str]
) -> None:
    """Accepted is posted, rejected is void, and an unknown result stays pending."""
    payready.provider.script[A] = [result]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert payready.fees(A) == entries


def test_balance_posts_an_uncertain_call(payready: InProcessSystem) -> None:
    """The balance proves that the call was accepted; the entry names the event as evidence."""
    payready.provider.script[A] = [CallResultUnknown("read timeout")]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.clock.advance(2)
    balance_id = payready.balance(A)
    payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "1 posted"]
    assert balance_id in str(payready.rows("SELECT evidence FROM fee_entry WHERE state = 'posted'")[0]["evidence"])
    assert payready.outcome("p1")["fee"] == {"amount": "0.100000", "currency": "USD", "state": "posted"}


def test_balance_before_the_response_posts_once(payready: InProcessSystem) -> None:
    """The webhook arrives before the 202: one posted entry, and the refresh stays answered."""

    def webhook_first() -> int:
        payready.balance(A)
        payready.run_tasks()
        return 202

    payready.provider.script[A] = [webhook_first]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "released"
    assert payready.fees(A) == ["1 pending", "1 posted"]
    assert payready.refreshes(A) == ["answered"]


def test_balance_posts_neither_of_two_uncertain_calls(payready: InProcessSystem) -> None:
    """Both stay pending, and the outcome has a pending fee."""
    payready.provider.script[A] = [CallResultUnknown("timeout"), CallResultUnknown("timeout")]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.pass_time(16)
    payready.balance(A)
    payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "2 pending"]
    assert payready.outcome("p1")["fee"] == {"amount": "0.200000", "currency": "USD", "state": "pending"}


def test_late_balance_posts_its_call_and_serves_the_next_payment(payready: InProcessSystem) -> None:
    """After the deadline the first payment stays failed. The next one needs no call and owes nothing."""
    payready.provider.script[A] = [CallResultUnknown("timeout"), CallNotSent("no connection")]
    payready.initiate("p1", A, timeout_s=10)
    payready.run_tasks()
    payready.pass_time(10)
    assert payready.state_or_reason("p1") == "provider_unavailable"
    payready.clock.advance(20)
    payready.balance(A)
    payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "1 posted"]
    assert payready.state_or_reason("p1") == "provider_unavailable"
    payready.clock.advance(5)
    payready.initiate("p2", A)
    payready.run_tasks()
    outcome = payready.outcome("p2")
    assert outcome["state"] == "released"
    assert outcome["fee"] == {"amount": "0", "currency": "USD", "state": "reused"}
    assert outcome["shared_by"] == 0
    assert payready.provider.calls == [A]


def test_balance_after_the_window_answers_the_refresh(payready: InProcessSystem) -> None:
    """`unanswered` is not final: a late balance still posts the fee."""
    payready.provider.script[A] = [CallResultUnknown("timeout")]
    payready.initiate("p1", A, timeout_s=10)
    payready.run_tasks()
    payready.pass_time(80)
    assert payready.refreshes(A) == ["unanswered"]
    payready.balance(A)
    payready.run_tasks()
    assert payready.refreshes(A) == ["answered"]
    assert payready.fees(A) == ["1 pending", "1 posted"]


def test_balance_from_before_the_call_does_not_post_it(payready: InProcessSystem) -> None:
    """It is older than the call by more than the clock skew."""
    payready.provider.script[A] = [CallResultUnknown("timeout")]
    payready.initiate("p1", A, max_balance_age_s=60)
    payready.run_tasks()
    payready.balance(A, at=START - timedelta(seconds=6))
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "released"
    assert payready.fees(A) == ["1 pending"]
    assert payready.refreshes(A) == ["uncertain"]


def test_late_balance_posts_the_call_of_an_abandoned_refresh(payready: InProcessSystem) -> None:
    """The second call was deferred until no payment was waiting; the first one had been accepted."""
    payready.provider.script[A] = [CallResultUnknown("timeout"), *[CallNotSent("no connection")] * 9]
    payready.initiate("p1", A, timeout_s=20)
    payready.run_tasks()
    payready.pass_time(25)
    assert payready.refreshes(A) == ["abandoned"]
    payready.balance(A)
    payready.run_tasks()
    assert payready.refreshes(A) == ["answered"]
    assert payready.fees(A)[-1] == "1 posted"
    assert payready.fees(A).count("1 pending") == 1


def test_late_balance_posts_the_call_before_a_rejected_one(payready: InProcessSystem) -> None:
    """The provider may have accepted the earlier call."""
    payready.provider.script[A] = [
        CallResultUnknown("timeout"),
        CallRejected(403, FailureReason.CONNECTION_INACTIVE, "inactive"),
    ]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.pass_time(16)
    assert payready.state_or_reason("p1") == "connection_inactive"
    payready.balance(A)
    payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "2 pending", "2 void", "1 posted"]


def test_balance_does_not_answer_a_refresh_without_an_accepted_call(payready: InProcessSystem) -> None:
    """The balance has another cause."""
    payready.provider.script[A] = [CallRejected(403, FailureReason.CONNECTION_INACTIVE, "inactive")]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.refreshes(A) == ["rejected"]
    assert payready.fees(A) == ["1 pending", "1 void"]


@pytest.mark.parametrize(("later_s", "entries"), [(120, ["2 pending"]), (3600, ["2 pending", "2 posted"])])
def test_ambiguous_balance_does_not_post_the_later_call(
    payready: InProcessSystem, later_s: int, entries: list[str]
) -> None:
    """The first call was accepted without a balance. For an hour, a balance may be its late response."""
    payready.provider.script[A] = [202, CallResultUnknown("timeout")]
    payready.initiate("p1", A, timeout_s=10)
    payready.run_tasks()
    payready.pass_time(61)
    payready.clock.advance(later_s - 61)
    payready.initiate("p2", A, timeout_s=10)
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.state_or_reason("p2") == "released"
    assert payready.fees(A) == ["1 pending", "1 posted", *entries]


BILLABLE = PRICES.replace('["accepted"]', '["accepted", "account_not_found", "rate_limited"]')


def test_billable_rejection_is_posted(
    payready: InProcessSystem, share_of: Callable[[InProcessSystem, str], Decimal]
) -> None:
    """The failed payments share its fee. A rejection that is not billable stays free."""
    payready.rt.price_list = parse_price_list(BILLABLE)
    for reason, status, account in (
        (FailureReason.ACCOUNT_NOT_FOUND, 404, A),
        (FailureReason.CONNECTION_INACTIVE, 403, "acct_free"),
    ):
        payready.provider.script[account] = [CallRejected(status, reason, "no")]
        for number in range(3):
            payready.initiate(f"{account}{number}", account)
        payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "1 posted"]
    assert payready.fees("acct_free") == ["1 pending", "1 void"]
    assert sum(share_of(payready, f"{A}{number}") for number in range(3)) == Decimal("0.1")
    assert share_of(payready, "acct_free0") == 0


def test_billable_rate_limited_call_does_not_make_attribution_ambiguous(
    payready: InProcessSystem,
) -> None:
    """No balance can belong to it, so the balance posts the other call."""
    payready.rt.price_list = parse_price_list(BILLABLE)
    payready.provider.script[A] = [RateLimited("rate limit", None), CallResultUnknown("timeout")]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.pass_time(2)
    payready.balance(A)
    payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "1 posted", "2 pending", "2 posted"]


def test_accepted_call_is_void_if_the_price_list_does_not_bill_it(payready: InProcessSystem) -> None:
    """The call still has an entry."""
    payready.rt.price_list = parse_price_list(PRICES.replace('["accepted"]', "[]"))
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "1 void"]
    assert payready.outcome("p1")["fee"] == {"amount": "0.000000", "currency": "USD", "state": "void"}


def test_entry_keeps_its_price_after_a_price_list_change(payready: InProcessSystem) -> None:
    payready.provider.script[A] = [CallResultUnknown("timeout")]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.rt.price_list = parse_price_list(PRICES.replace('"test"', '"dear"').replace("0.100000", "0.9"))
    payready.balance(A)
    payready.run_tasks()
    payready.initiate("p2", "acct_other")
    payready.run_tasks()
    rows = payready.rows("SELECT price, price_list, state FROM fee_entry ORDER BY entry_id")
    entries = [(Decimal(str(row["price"])), row["price_list"], row["state"]) for row in rows]
    dime, dear = Decimal("0.1"), Decimal("0.9")
    assert entries == [
        (dime, "test", "pending"),
        (dime, "test", "posted"),
        (dear, "dear", "pending"),
        (dear, "dear", "posted"),
    ]


def test_balance_between_two_calls_posts_the_first_call(
    payready: InProcessSystem, share_of: Callable[[InProcessSystem, str], Decimal]
) -> None:
    """The second call is claimed after the balance was stored and before it was applied."""
    payready.provider.script[A] = [CallResultUnknown("timed out")]
    payready.initiate("p1", A, timeout_s=120)
    payready.run_tasks()
    payready.clock.advance(payready.rt.settings.uncertain_grace_s)
    payready.queue.add(flow.sweep_refreshes_and_balances(payready.rt))  # repeats: the call is enqueued
    assert payready.queue.calls
    payready.balance(A)
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "released"
    assert payready.provider.calls == [A]
    assert (payready.fees(A), payready.refreshes(A)) == (["1 pending", "1 posted"], ["answered"])
    assert share_of(payready, "p1") == Decimal("0.1")
