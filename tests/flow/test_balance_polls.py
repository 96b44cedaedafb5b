"""Balance polls: free polls shortly before a deadline, because the webhook may be lost."""

from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from tests.support.in_process import START, InProcessSystem, MakeSystem
from worker import flow
from worker.errors import CallNotSent
from worker.flow.check_decision import MAX_APPLY_DELAY
from worker.quiltt.messages import PolledAccount

A, B = "acct_a", "acct_b"


def show_balance(
    payready: InProcessSystem, account_id: str, at: datetime, *, source: str = "REFRESH", **account: Any
) -> None:
    """Make balance polls return this balance."""
    balance = {"id": "bal_1", "at": at.isoformat(), "source": source, "available": Decimal(100)}
    polled = {
        "kind": "DEPOSITORY",
        "currencyCode": "USD",
        "balance": {**balance, "current": None, "limit": None},
        **account,
    }
    payready.provider.accounts[account_id] = PolledAccount.model_validate(polled)


def initiate_and_run(payready: InProcessSystem, payment_id: str = "p1", account_id: str = A, **job: Any) -> None:
    """Make the call of a payment. The read of the account before it is not counted as a poll."""
    payready.initiate(payment_id, account_id, **{"profile_id": "p_1", "timeout_s": 60, "amount": "80.00", **job})
    payready.run_tasks()
    payready.provider.reads.clear()


def test_polled_refresh_balance_releases_and_shares_the_fee(payready: InProcessSystem) -> None:
    initiate_and_run(payready)
    show_balance(payready, A, START + timedelta(seconds=3))
    payready.pass_time(49)
    assert payready.provider.reads == []
    payready.pass_time(1)
    assert payready.provider.reads == [(A, "p_1")]
    outcome = payready.outcome("p1")
    assert (outcome["state"], outcome["balance"]["id"], outcome["fee"]["amount"]) == ("released", "bal_1", "0.100000")
    payready.balance(A, balance_id="bal_1")
    payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "1 posted"]


def test_one_poll_serves_all_payments_of_an_account(payready: InProcessSystem) -> None:
    for n in range(5):
        initiate_and_run(payready, f"p{n}", timeout_s=60 + n)
    payready.pass_time(60)
    assert payready.provider.reads == [(A, "p_1")]
    payready.pass_time(5)
    assert {payready.state_or_reason(f"p{n}") for n in range(5)} == {"timeout"}
    assert len(payready.provider.reads) == 1


@pytest.mark.parametrize("job", [{"profile_id": None}, {"timeout_s": 3600}])
def test_payment_without_a_profile_or_near_deadline_is_not_polled(
    payready: InProcessSystem, job: dict[str, Any]
) -> None:
    initiate_and_run(payready, **job)
    payready.pass_time(70)
    assert payready.provider.reads == []


def test_short_timeout_is_polled_in_its_last_quarter(payready: InProcessSystem) -> None:
    initiate_and_run(payready, timeout_s=8)
    payready.pass_time(5)
    assert payready.provider.reads == []
    payready.pass_time(1)
    assert payready.provider.reads == [(A, "p_1")]


@pytest.mark.parametrize(
    "account",
    [
        {"balance": None},
        {"at": START - timedelta(seconds=60)},
        {"source": "SYNC", "at": START + timedelta(seconds=3)},
        {"balance": {"id": "bal_1", "at": "yesterday", "source": "REFRESH"}},
    ],
)
def test_polled_balance_releases_only_if_it_is_a_fresh_refresh_balance(
    payready: InProcessSystem, account: dict[str, Any]
) -> None:
    initiate_and_run(payready)
    show_balance(payready, A, **{"at": START, **account})
    payready.pass_time(61)
    assert len(payready.provider.reads) == 1
    assert payready.state_or_reason("p1") == "timeout"


def test_sync_balance_after_the_call_releases_if_allowed(make_system: MakeSystem) -> None:
    with make_system(allow_sync_balances=True) as payready:
        initiate_and_run(payready)
        show_balance(payready, A, START + timedelta(seconds=30), source="SYNC")
        payready.pass_time(50)
        outcome = payready.outcome("p1")
        assert (outcome["state"], outcome["balance"]["source"], outcome["shared_by"]) == ("released", "SYNC", 1)
        initiate_and_run(payready, "p2", max_balance_age_s=300, amount="10.00")
        assert payready.state_or_reason("p2") == "waiting", "the sync balance serves no other payment"
        payready.balance(A)
        payready.run_tasks()
        assert (payready.state_or_reason("p2"), payready.refreshes(A)) == ("released", ["answered"])
        assert payready.outcome("p2")["fee"]["amount"] == "0", "the outcome of p1 has the whole fee"


@pytest.mark.parametrize(
    ("job", "at"), [({"max_balance_age_s": 0}, START + timedelta(seconds=30)), ({}, START - timedelta(seconds=20))]
)
def test_sync_balance_never_replaces_an_own_or_later_call(
    make_system: MakeSystem, job: dict[str, Any], at: datetime
) -> None:
    with make_system(allow_sync_balances=True) as payready:
        initiate_and_run(payready, **job)
        show_balance(payready, A, at, source="SYNC")
        payready.pass_time(61)
        assert payready.state_or_reason("p1") == "timeout"


@pytest.mark.parametrize(
    ("account", "job", "reason"),
    [
        ({"kind": "CREDIT"}, {}, "account_unsupported"),
        ({"kind": "LOAN"}, {"funds_check": "disabled"}, "released"),
        ({"currencyCode": "EUR"}, {}, "account_unsupported"),
        ({"currencyCode": "EUR"}, {"amount": None}, "released"),
    ],
)
def test_polled_unsupported_account_fails_its_payments(
    payready: InProcessSystem, account: dict[str, Any], job: dict[str, Any], reason: str
) -> None:
    initiate_and_run(payready, **job)
    show_balance(payready, A, START + timedelta(seconds=3), **account)
    payready.pass_time(50)
    assert payready.state_or_reason("p1") == reason


def test_polls_keep_to_their_rate_and_do_not_delay_expiry(make_system: MakeSystem) -> None:
    with make_system(balance_polls_per_s=2) as payready:
        for n in range(30):
            initiate_and_run(payready, f"p{n}", f"acct_{n}")
        initiate_and_run(payready, "q", B, profile_id=None)
        payready.pass_time(52)
        assert len(payready.provider.reads) == 6
        payready.pass_time(8)
        assert payready.state_or_reason("q") == "timeout"
        assert {payready.state_or_reason(f"p{n}") for n in range(30)} == {"timeout"}
        assert len({account for account, _ in payready.provider.reads}) == len(payready.provider.reads) == 20


def test_polls_can_be_disabled(make_system: MakeSystem) -> None:
    with make_system(balance_polls_per_s=0) as payready:
        initiate_and_run(payready)
        payready.pass_time(61)
        assert payready.provider.reads == []
        assert payready.state_or_reason("p1") == "timeout"


def test_failed_poll_changes_nothing(payready: InProcessSystem) -> None:
    initiate_and_run(payready)
    payready.provider.accounts[A] = CallNotSent("no connection")
    payready.pass_time(61)
    assert payready.state_or_reason("p1") == "timeout"


def test_payments_expire_without_a_poll_while_redis_is_unavailable(payready: InProcessSystem) -> None:
    initiate_and_run(payready)
    with payready.redis_unavailable():
        payready.pass_time(61)
    assert payready.state_or_reason("p1") == "timeout"


def test_expiry_waits_for_an_unapplied_balance(payready: InProcessSystem) -> None:
    initiate_and_run(payready, profile_id=None)
    payready.pass_time(59)
    payready.balance(A)
    payready.drop_tasks()
    payready.clock.advance(2)
    payready.run_maintenance()
    assert payready.state_or_reason("p1") == "released"


def test_expiry_waits_for_an_unapplied_balance_only_briefly(
    payready: InProcessSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    initiate_and_run(payready, profile_id=None)
    payready.pass_time(59)
    payready.balance(A, stored_only=True)
    for _ in range(int(MAX_APPLY_DELAY.total_seconds())):
        payready.drop_tasks()
        payready.clock.advance(1)
        payready.queue.add(flow.expire_poll_or_rejoin_due_payments(payready.rt).follow_up)
    assert payready.state_or_reason("p1") == "waiting"
    payready.clock.advance(1)
    payready.queue.add(flow.expire_poll_or_rejoin_due_payments(payready.rt).follow_up)
    assert payready.state_or_reason("p1") == "timeout"


def test_stored_balance_prevents_a_call_after_a_redis_flush(payready: InProcessSystem) -> None:
    initiate_and_run(payready)
    payready.balance(A)
    payready.run_tasks()
    payready.flush()
    initiate_and_run(payready, "p2", amount="10.00")
    assert payready.state_or_reason("p2") == "released"
    payready.clock.advance(1)
    initiate_and_run(payready, "p3", max_balance_age_s=0)
    assert payready.provider.calls == [A, A]


def test_fee_shares_add_up_after_a_sync_balance(
    make_system: MakeSystem, share_of: Callable[[InProcessSystem, str], Decimal]
) -> None:
    with make_system(allow_sync_balances=True) as payready:
        payready.initiate("p1", A, timeout_s=60, profile_id="p_1")
        payready.initiate("p2", A, timeout_s=60, max_balance_age_s=0)
        payready.run_tasks()
        show_balance(payready, A, START + timedelta(seconds=30), source="SYNC")
        payready.pass_time(50)
        assert payready.state_or_reason("p1") == "released"
        payready.balance(A)
        payready.run_tasks()
        assert payready.state_or_reason("p2") == "released"
        shares = [Decimal(payready.outcome(p)["fee"]["amount"]) for p in ("p1", "p2")]
        assert sum(shares) == Decimal("0.1"), shares
        assert [share_of(payready, p) for p in ("p1", "p2")] == shares


def test_sync_balance_does_not_release_a_payment_without_a_call(make_system: MakeSystem) -> None:
    """An old unanswered call is not the payment's call."""
    with make_system(allow_sync_balances=True, circuit_breaker_failures=3, calls_per_s=20) as payready:
        payready.initiate("old", A, timeout_s=60)
        payready.run_tasks()
        payready.pass_time(3600)
        assert payready.refreshes(A) == ["unanswered"]
        payready.initiate("p1", A, timeout_s=60, profile_id="p_1")
        for _ in range(3):
            payready.rt.admission.apply_result_to_breaker_and_limiter("failed", payready.clock(), payready.clock())
        payready.run_tasks()
        show_balance(payready, A, START + timedelta(seconds=3620), source="SYNC")
        for _ in range(58):
            payready.clock.advance(1)
            payready.drop_tasks()
            payready.queue.add(flow.expire_poll_or_rejoin_due_payments(payready.rt).follow_up)
            payready.queue.calls.clear()
            payready.run_tasks()
        assert payready.state_or_reason("p1") == "waiting"


def test_payment_whose_first_call_message_was_lost_is_polled(payready: InProcessSystem) -> None:
    payready.initiate("p1", A, timeout_s=15, profile_id="p_1")
    payready.drop_tasks()
    payready.pass_time(16)
    assert payready.provider.calls == [A]
    assert payready.provider.reads == [(A, "p_1")]
