"""Claims of a batch: calls of locked accounts are returned, and a conflict leaves nothing written."""

from collections.abc import Sequence
from datetime import timedelta

import pytest
from sqlalchemy.exc import IntegrityError

from tests.support.databases import Databases
from tests.support.in_process import InProcessSystem
from worker import flow
from worker.flow import RefreshCall
from worker.ledger import payments, refreshes
from worker.ledger.engine import transaction
from worker.ledger.locks import lock_accounts

A, B = "acct_1", "acct_2"


def call_of_waiting_payment(payready: InProcessSystem, account_id: str) -> RefreshCall:
    """Accept a job for the account, and return the call that it needs. It is not made."""
    payready.initiate(f"pay_{account_id}", account_id, max_balance_age_s=60)
    [call] = payready.queue.calls
    payready.drop_tasks()
    return call


def claim(payready: InProcessSystem, calls: Sequence[RefreshCall]) -> tuple[list[str], list[RefreshCall]]:
    """Claim calls. Return the accounts of the claims, and the contended calls."""
    batch = flow.claim_delay_or_reject_calls(payready.rt, calls)
    return [claim.refresh.account_id for claim in batch.claims], list(batch.contended)


def test_calls_of_locked_accounts_are_returned_as_contended(payready: InProcessSystem, databases: Databases) -> None:
    """The other calls are claimed. The load waits for no row of the locked account, and nothing of it is changed."""
    if databases.is_sqlite:
        pytest.skip("SQLite has one writer at a time")
    calls = [call_of_waiting_payment(payready, account_id) for account_id in (A, B)]
    with transaction(payready.engine) as tx:
        refreshes.insert_refreshes(tx, [refreshes.new_refresh(A, calls[0].refresh_id, payready.clock.now)])
    with transaction(payready.engine) as other:
        lock_accounts(other, [A])
        assert list(payments.lock_waiting_by_account(other, [A]).result()) == [A]
        assert claim(payready, calls) == ([B], [calls[0]])
        assert payready.refreshes(A) == ["requested"]
    assert claim(payready, calls) == ([A], [])
    assert payready.fees(A) == payready.fees(B) == ["1 pending"]


def test_conflicting_claims_leave_nothing_written(payready: InProcessSystem) -> None:
    """Two messages name one refresh for two accounts. Alone, the first is claimed, and the second needs no call."""
    first, second = (call_of_waiting_payment(payready, account_id) for account_id in (A, B))
    stray = RefreshCall(account_id=B, refresh_id=first.refresh_id)
    with pytest.raises(IntegrityError):
        claim(payready, [first, stray, second])
    assert payready.rows("SELECT * FROM refresh") == payready.rows("SELECT * FROM fee_entry") == []
    for call in (first, stray, second):
        flow.claim_and_call(payready.rt, call.account_id, call.refresh_id)
    assert payready.provider.calls == [A, B]
    assert payready.fees(A) == payready.fees(B) == ["1 pending", "1 posted"]


@pytest.mark.parametrize(("age_us", "is_applied"), [(0, True), (1, False)])
def test_stored_balance_is_applied_instead_of_a_call_if_no_payment_is_too_young(
    payready: InProcessSystem, age_us: int, *, is_applied: bool
) -> None:
    """The oldest balance that the payment accepts is `clock_skew` older than its `min_balance_at`."""
    at, skew = payready.clock.now, payready.rt.settings.clock_skew
    payready.initiate("pay_0", A)
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    payready.flush()  # else the next payment reuses the balance at its intake
    payready.clock.now = at + timedelta(seconds=60) + skew + timedelta(microseconds=age_us)
    batch = flow.claim_delay_or_reject_calls(payready.rt, [call_of_waiting_payment(payready, A)])
    assert bool(batch.follow_up.balances_to_apply) == is_applied
    assert bool(batch.claims) != is_applied
