"""A payment is judged on the newest balance that is known for its account, whatever arrived last."""

from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal

import pytest

from tests.support.in_process import InProcessSystem, MakeSystem
from worker import flow
from worker.errors import RateLimited
from worker.quiltt.messages import Balance, BalanceWithEventId, PolledAccount

A = "acct_newest"


def refresh_balance(payready: InProcessSystem, balance_id: str, available: str, *, at_s: float) -> BalanceWithEventId:
    """Return a REFRESH balance that is dated this many seconds after now."""
    balance = Balance.model_validate(
        {
            "id": balance_id,
            "accountId": A,
            "at": (payready.clock.now + timedelta(seconds=at_s)).isoformat(),
            "source": "REFRESH",
            "available": Decimal(available),
            "current": None,
            "limit": None,
        }
    )
    return BalanceWithEventId(event_id=f"evt_{balance_id}", balance=balance)


def empty_redis(payready: InProcessSystem) -> None:
    """Lose what Redis knows of the account. Maintenance copies it from the ledger."""
    payready.flush()


def rate_limit_a_call(payready: InProcessSystem) -> None:
    """Make a call that gets 429. The account's state in Redis is then rebuilt from the ledger."""
    payready.provider.script[A].append(RateLimited("rate limit", None))
    payready.initiate("limited", A, max_balance_age_s=0)
    payready.run_tasks()
    payready.queue.add(flow.fail_waiting_as_cancelled_with_fee_share(payready.rt, ["limited"]))
    payready.run_tasks()


@pytest.mark.parametrize("lose", [empty_redis, rate_limit_a_call])
def test_balance_dated_ahead_hides_no_newer_one(
    payready: InProcessSystem, lose: Callable[[InProcessSystem], None]
) -> None:
    payready.balance(A, "100.25", at=payready.clock.now + timedelta(minutes=10))
    payready.clock.advance(2.5)
    newer = payready.balance(A, "77.00")
    payready.run_tasks()
    lose(payready)
    payready.initiate("p1", A, amount="90.00", max_balance_age_s=60)
    payready.run_tasks()
    payready.pass_time(6)
    assert payready.state_or_reason("p1") == "insufficient_funds"
    assert payready.payment("p1")["balance_id"] == newer


def test_balance_dated_ahead_hides_no_newer_one_from_redis(payready: InProcessSystem) -> None:
    payready.balance(A, "100.25", at=payready.clock.now + timedelta(minutes=10))
    payready.clock.advance(2.5)
    newer = payready.balance(A, "77.00")
    payready.run_tasks()
    assert payready.account_hash(A).balance == newer
    payready.initiate("p1", A, amount="90.00", max_balance_age_s=60)
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "insufficient_funds"


def test_balance_dated_ahead_is_no_older_than_its_arrival(payready: InProcessSystem) -> None:
    """A payment of ten minutes later does not accept it as fresh."""
    payready.balance(A, at=payready.clock.now + timedelta(minutes=10))
    payready.run_tasks()
    payready.clock.advance(600)
    payready.initiate("p1", A, max_balance_age_s=60)
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "waiting"


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("apart_s", [1, 0.25])
def test_newest_balance_of_a_delivery_decides(payready: InProcessSystem, order: list[int], apart_s: float) -> None:
    payready.initiate("p1", A, amount="60.00")
    payready.run_tasks()
    payready.clock.advance(2)
    listed = [
        refresh_balance(payready, "bal_100", "100.00", at_s=-1),
        refresh_balance(payready, "bal_40", "40.00", at_s=-1 + apart_s),
    ]
    payready.queue.add(flow.ingest_events_and_resolve_payments(payready.rt, [listed[index] for index in order]))
    assert payready.state_or_reason("p1") == "insufficient_funds"
    payready.run_tasks()
    assert payready.outcome("p1")["detail"] == "needed 60.00 USD, available 40.00 USD"


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_lower_of_two_equally_new_balances_decides(payready: InProcessSystem, order: list[int]) -> None:
    payready.initiate("p1", A, amount="60.00")
    payready.run_tasks()
    listed = [
        refresh_balance(payready, "bal_100", "100.00", at_s=0),
        refresh_balance(payready, "bal_40", "40.00", at_s=0),
    ]
    payready.queue.add(flow.ingest_events_and_resolve_payments(payready.rt, [listed[index] for index in order]))
    assert payready.state_or_reason("p1") == "insufficient_funds"


def test_newer_balance_that_is_not_applied_yet_decides(payready: InProcessSystem) -> None:
    """The account was locked when the newer balance arrived. An older one arrives late and is applied first."""
    payready.initiate("p1", A, amount="60.00")
    payready.run_tasks()
    payready.clock.advance(6)
    newer = payready.balance(A, "40.00", stored_only=True)
    payready.drop_tasks()
    payready.clock.advance(1)
    payready.balance(A, "100.00", at=payready.clock.now - timedelta(seconds=6))
    assert payready.state_or_reason("p1") == "insufficient_funds"
    assert payready.payment("p1")["balance_id"] == newer


def test_late_older_balance_releases_no_payment_that_a_known_balance_does_not_cover(payready: InProcessSystem) -> None:
    """The payment waits for its own call, because Redis lost the known balance."""
    payready.balance(A, "40.00")
    payready.run_tasks()
    payready.flush()
    payready.clock.advance(2)
    payready.initiate("p1", A, amount="60.00", max_balance_age_s=60)
    payready.drop_tasks()  # its call is not made yet
    payready.balance(A, "100.00", at=payready.clock.now - timedelta(seconds=7))
    assert payready.state_or_reason("p1") == "insufficient_funds"


def test_late_older_balance_releases_no_payment_without_an_allowed_age(payready: InProcessSystem) -> None:
    """Both balances are the payment's own: within the clock skew, the older one may answer its call too."""
    payready.clock.advance(10)
    payready.initiate("p1", A, amount="60.00", max_balance_age_s=0)
    payready.run_tasks()
    payready.clock.advance(3)
    payready.balance(A, "40.00", stored_only=True)
    payready.drop_tasks()
    payready.balance(A, "100.00", at=payready.clock.now - timedelta(seconds=5))
    assert payready.state_or_reason("p1") == "insufficient_funds"


def test_newer_higher_balance_releases_although_an_older_one_is_applied_after_it(payready: InProcessSystem) -> None:
    """The newest balance decides in both directions."""
    payready.initiate("p1", A, amount="60.00")
    payready.run_tasks()
    payready.clock.advance(6)
    newer = payready.balance(A, "100.00", stored_only=True)
    payready.drop_tasks()
    payready.balance(A, "40.00", at=payready.clock.now - timedelta(seconds=5))
    assert payready.state_or_reason("p1") == "released"
    assert payready.payment("p1")["balance_id"] == newer


def test_newest_balance_of_unknown_amount_fails_a_required_check(payready: InProcessSystem) -> None:
    payready.initiate("p1", A, amount="60.00")
    payready.run_tasks()
    payready.clock.advance(6)
    payready.balance(A, None, stored_only=True)
    payready.drop_tasks()
    payready.balance(A, "100.00", at=payready.clock.now - timedelta(seconds=5))
    assert payready.state_or_reason("p1") == "funds_unknown"


def polled(
    balance_id: str, at: datetime, available: str, source: str = "REFRESH", kind: str = "DEPOSITORY"
) -> PolledAccount:
    """Return what a balance poll reads."""
    amounts = {"available": Decimal(available), "current": None, "limit": None}
    balance = {"id": balance_id, "accountId": A, "at": at.isoformat(), "source": source, **amounts}
    return PolledAccount.model_validate({"kind": kind, "currencyCode": "USD", "balance": balance})


def test_poll_never_makes_an_old_balance_fresh(make_system: MakeSystem) -> None:
    """A poll returns the last balance of the account, whatever its age: its arrival is not believed."""
    with make_system(refresh_balance_time="arrival") as payready:
        payready.provider.accounts[A] = polled("bal_old", payready.clock.now - timedelta(days=2), "100.00")
        payready.initiate("p1", A, amount="60.00", max_balance_age_s=0, timeout_s=20, profile_id="p_1")
        payready.run_tasks()
        payready.pass_time(21)
        assert payready.state_or_reason("p1") == "timeout"


def test_newer_sync_balance_fails_a_payment_that_it_could_not_release(make_system: MakeSystem) -> None:
    with make_system(allow_sync_balances=True) as payready:
        payready.initiate("p1", A, amount="60.00", max_balance_age_s=0, timeout_s=60, profile_id="p_1")
        payready.run_tasks()
        payready.clock.advance(30)
        payready.provider.accounts[A] = polled("bal_sync", payready.clock.now, "40.00", source="SYNC")
        payready.queue.add(flow.poll_balance_and_resolve_payments(payready.rt, A, "p_1"))
        payready.run_tasks()
        payready.clock.advance(1)
        payready.balance(A, "100.00", at=payready.clock.now - timedelta(seconds=30))
        assert payready.state_or_reason("p1") == "insufficient_funds"


def test_believed_arrival_does_not_reorder_balances(make_system: MakeSystem) -> None:
    """A late, older balance is fresh by its arrival, but the newer one is known."""
    with make_system(refresh_balance_time="arrival") as payready:
        payready.initiate("p0", A, amount="60.00", max_balance_age_s=0)
        payready.run_tasks()
        start = payready.clock.now
        payready.clock.advance(6)
        payready.balance(A, "40.00", at=start + timedelta(seconds=6))
        payready.run_tasks()
        payready.clock.advance(2)
        payready.initiate("p1", A, amount="60.00", max_balance_age_s=0)
        payready.run_tasks()
        payready.clock.advance(1)
        payready.balance(A, "100.00", at=start)
        assert payready.state_or_reason("p1") == "insufficient_funds"
