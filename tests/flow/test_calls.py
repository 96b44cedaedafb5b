"""Invariants 5 and 6: no early retry of a call that may have been accepted; one refresh in flight per account."""

import itertools
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy.exc import IntegrityError

from tests.support.in_process import PRICES, START, InProcessSystem
from worker import flow
from worker.errors import CallFailed, CallNotSent, CallRejected, CallResultUnknown, FailureReason, RateLimited
from worker.flow import CALL_ENQUEUE_RETRY
from worker.ledger import fee_statement, refreshes
from worker.ledger.engine import transaction
from worker.ledger.refreshes import RefreshRecord
from worker.rules import states
from worker.rules.pricing import parse_price_list
from worker.rules.states import RefreshState

A = "acct_calls"


@pytest.mark.parametrize("failure", [CallNotSent("no connection: connect error"), RateLimited("rate limit", None)])
def test_call_that_was_not_accepted_is_retried_with_backoff(
    payready: InProcessSystem, failure: CallNotSent | RateLimited
) -> None:
    """The delays are 1, 2, 4, ... s, and each attempt has its own void entry."""
    payready.provider.script[A] = [failure] * 4
    payready.initiate("p1", A, timeout_s=120)
    payready.run_tasks()
    tries = [payready.clock.now]
    while len(payready.provider.calls) < 5:
        before = len(payready.provider.calls)
        payready.pass_time(1)
        if len(payready.provider.calls) > before:
            tries.append(payready.clock.now)
    pauses = [(later - earlier).total_seconds() for earlier, later in itertools.pairwise(tries)]
    assert pauses == [1, 2, 4, 8]
    assert payready.fees(A) == [f"{n} {state}" for n in range(1, 5) for state in ("pending", "void")] + [
        "5 pending",
        "5 posted",
    ]
    payready.balance(A)
    payready.run_tasks()
    assert payready.outcome("p1")["fee"]["amount"] == "0.100000"


def test_failed_payment_shares_the_fee_of_billed_429(
    payready: InProcessSystem, share_of: Callable[[InProcessSystem, str], Decimal]
) -> None:
    """A contract may bill it, although it does not count as a call."""
    payready.rt.price_list = parse_price_list(PRICES.replace('"accepted"', '"rate_limited"'))
    payready.provider.script[A] = [RateLimited("rate limit", None)] * 9
    payready.initiate("p1", A, timeout_s=2)
    payready.run_tasks()
    payready.pass_time(2)
    assert payready.state_or_reason("p1") == "provider_unavailable"
    billed = payready.fees(A).count("1 posted") + payready.fees(A).count("2 posted")
    assert share_of(payready, "p1") == Decimal("0.1") * billed > 0


def test_backoff_is_at_most_30_s() -> None:
    """The delays are 1, 2, 4, 8, 16, 30, 30, ... s."""
    assert [states.backoff(n).total_seconds() for n in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert states.backoff(10_000) == timedelta(seconds=30)


def test_rate_limited_call_waits_for_the_reset_time(payready: InProcessSystem) -> None:
    payready.provider.script[A] = [RateLimited("rate limit", START + timedelta(seconds=7))]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.pass_time(6)
    assert payready.provider.calls == [A]
    payready.pass_time(1)
    assert payready.provider.calls == [A, A]


def test_rate_limit_reset_is_capped_at_60_s(payready: InProcessSystem) -> None:
    """The provider's clock may be wrong."""
    payready.provider.script[A] = [RateLimited("rate limit", START + timedelta(days=900))]
    payready.initiate("p1", A, timeout_s=300)
    payready.run_tasks()
    payready.pass_time(59)
    assert payready.provider.calls == [A]
    payready.pass_time(2)
    assert payready.provider.calls == [A, A]


def test_early_or_duplicate_call_message_makes_no_call(payready: InProcessSystem) -> None:
    """The refresh is deferred at first, and called later."""
    payready.provider.script[A] = [RateLimited("rate limit", None)]
    accepted = payready.initiate("p1", A)
    payready.run_tasks()
    for _ in range(3):
        payready.queue.calls.append(flow.RefreshCall(account_id=A, refresh_id=str(accepted.refresh_id)))
        payready.run_tasks()
    assert payready.provider.calls == [A]
    payready.pass_time(1)
    for _ in range(3):
        payready.queue.calls.append(flow.RefreshCall(account_id=A, refresh_id=str(accepted.refresh_id)))
        payready.run_tasks()
    assert payready.provider.calls == [A, A]


def test_unknown_result_is_retried_once_after_the_grace_period(payready: InProcessSystem) -> None:
    """The balance may arrive in the grace period. A third call is never made."""
    payready.provider.script[A] = [CallResultUnknown("timeout")] * 9
    payready.initiate("p1", A, timeout_s=3600)
    payready.run_tasks()
    payready.pass_time(14)
    assert payready.provider.calls == [A]
    payready.pass_time(2)
    assert payready.provider.calls == [A, A]
    payready.pass_time(600)
    assert payready.provider.calls == [A, A]
    assert payready.fees(A) == ["1 pending", "2 pending"]
    assert payready.refreshes(A) == ["unanswered"]


def test_balance_within_the_grace_period_prevents_the_second_call(payready: InProcessSystem) -> None:
    """The first call was accepted."""
    payready.provider.script[A] = [CallResultUnknown("reset")]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.pass_time(10)
    payready.balance(A)
    payready.run_tasks()
    payready.pass_time(120)
    assert payready.state_or_reason("p1") == "released"
    assert payready.provider.calls == [A]


def test_balance_prevents_an_enqueued_second_call(payready: InProcessSystem) -> None:
    """The second call was already enqueued when the balance arrived."""
    payready.provider.script[A] = [CallResultUnknown("reset")]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.clock.advance(15)
    follow_up = flow.sweep_refreshes_and_balances(payready.rt)
    assert follow_up.calls
    payready.balance(A)
    payready.run_tasks()
    payready.queue.add(follow_up)
    payready.run_tasks()
    assert payready.provider.calls == [A]
    assert payready.refreshes(A) == ["answered"]


def test_second_call_is_not_made_after_the_deadline(payready: InProcessSystem) -> None:
    """The payment expired in the grace period."""
    payready.provider.script[A] = [CallResultUnknown("timeout")]
    payready.initiate("p1", A, timeout_s=10)
    payready.run_tasks()
    payready.pass_time(120)
    assert payready.provider.calls == [A]


def test_deferred_second_call_remains_the_second(payready: InProcessSystem) -> None:
    """Calls that were not sent do not count, but unknown results do."""
    payready.provider.script[A] = [
        CallResultUnknown("timeout"),
        CallNotSent("no"),
        CallNotSent("no"),
        CallResultUnknown("timeout"),
        202,
    ]
    payready.initiate("p1", A, timeout_s=600)
    payready.run_tasks()
    payready.pass_time(300)
    assert len(payready.provider.calls) == 4
    assert [entry for entry in payready.fees(A) if "pending" not in entry] == ["2 void", "3 void"]


@pytest.mark.parametrize(
    "reason",
    [
        FailureReason.ACCOUNT_NOT_FOUND,
        FailureReason.ACCOUNT_UNSUPPORTED,
        FailureReason.CONNECTION_INACTIVE,
        FailureReason.NOT_AUTHORIZED,
    ],
)
def test_rejected_call_fails_all_waiting_payments_of_the_account(
    payready: InProcessSystem, reason: FailureReason
) -> None:
    """This includes payments that joined during the call, and no payment of another account."""

    def refuse() -> CallFailed:
        payready.initiate("p3", A)
        return CallRejected(400, reason, "no")

    payready.provider.script[A] = [refuse]
    payready.initiate("p1", A)
    payready.initiate("p2", A)
    payready.initiate("other", "acct_other")
    payready.run_tasks()
    for payment_id in ("p1", "p2", "p3"):
        assert payready.outcome(payment_id) == {"payment_id": payment_id, "reason": reason.value, "detail": "no"}
    assert payready.state_or_reason("other") == "waiting"
    assert payready.provider.calls.count(A) == 1


def test_payment_after_a_rejected_call_makes_a_new_call(payready: InProcessSystem) -> None:
    """The user may have reconnected."""
    payready.provider.script[A] = [CallRejected(403, FailureReason.CONNECTION_INACTIVE, "inactive")]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.initiate("p2", A)
    payready.run_tasks()
    assert payready.provider.calls == [A, A]
    assert payready.state_or_reason("p2") == "waiting"


def test_payments_share_a_call_in_flight(payready: InProcessSystem) -> None:
    """Fifty payments need one call and one fee."""
    for number in range(50):
        payready.initiate(f"p{number}", A)
        payready.run_tasks()
        payready.clock.advance(0.1)
    assert payready.provider.calls == [A]
    payready.balance(A)
    payready.run_tasks()
    assert {payready.outcome(f"p{number}")["shared_by"] for number in range(50)} == {50}


def test_database_rejects_a_second_refresh_in_flight(payready: InProcessSystem) -> None:
    """A unique index guarantees it."""
    with transaction(payready.engine) as tx:
        numbered = ((1, RefreshState.ACCEPTED), (2, RefreshState.UNCERTAIN), (3, RefreshState.REQUESTED))
        flights = [RefreshRecord(refresh_id=f"ref_{n}", account_id=A, state=state) for n, state in numbered]
        assert refreshes.insert_refreshes(tx, flights).result() == {"ref_1", "ref_3"}
        waiting = refreshes.find(tx, "ref_3")
        assert waiting is not None
    with pytest.raises(IntegrityError), transaction(payready.engine) as tx:
        refreshes.transition(tx, waiting, states.RefreshEvent.CLAIM, None)


def test_entry_of_a_call_records_the_mode_of_the_api_key(payready: InProcessSystem) -> None:
    """The statement names it: a call in another mode than PRODUCTION is not billed."""
    payready.initiate("p1", A)
    payready.run_tasks()
    with transaction(payready.engine) as tx:
        modes = fee_statement.calls_by_mode(tx, START - timedelta(days=1), START + timedelta(days=1))
    assert modes == {payready.rt.fetch_allowed_api_key_mode_once(): 1}


def test_call_is_deferred_while_its_price_is_unknown(payready: InProcessSystem) -> None:
    """The introspection of the API key failed, so the call waits for a retry."""
    payready.provider.introspection_results = [
        CallNotSent("the provider did not respond to the introspection of our key")
    ]
    payready.initiate("p1", A, timeout_s=60)
    payready.run_tasks()
    assert payready.provider.calls == []
    assert payready.fees(A) == []
    payready.pass_time(3)
    assert payready.provider.calls == [A]
    assert payready.provider.introspections == 2


def test_wrong_api_key_fails_payments_without_a_call(payready: InProcessSystem) -> None:
    """The reason is `not_authorized`, and no fee is due."""
    payready.provider.introspection_results = [
        CallRejected(401, FailureReason.NOT_AUTHORIZED, "the provider does not accept our API key")
    ]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "not_authorized"
    assert payready.provider.calls == []
    assert payready.fees(A) == []


def test_production_key_makes_no_call_in_development(payready: InProcessSystem) -> None:
    """The call would be billed."""
    payready.provider.introspection_results = ["PRODUCTION"]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "not_authorized"
    assert "PAYREADY_ALLOW_PRODUCTION_KEY" in payready.outcome("p1")["detail"]
    assert payready.provider.calls == []


def test_call_without_a_worker_is_enqueued_at_the_retry_interval(
    payready: InProcessSystem,
) -> None:
    """A queue without a consumer grows slowly."""
    payready.provider.script[A] = [RateLimited("rate limit", None)]
    payready.initiate("p1", A, timeout_s=3600)
    payready.run_tasks()
    enqueued = 0
    for _ in range(120):
        payready.clock.advance(1)
        enqueued += len(flow.expire_poll_or_rejoin_due_payments(payready.rt).follow_up.calls)
        enqueued += sum(call.has_slot for call in flow.sweep_refreshes_and_balances(payready.rt).calls)
    assert 120 / CALL_ENQUEUE_RETRY.total_seconds() - 1 <= enqueued <= 120 / CALL_ENQUEUE_RETRY.total_seconds() + 2
