"""Invariant 2: no payment is forgotten, and after a Redis flush no account in flight is billed again."""

from decimal import Decimal

import pytest

from tests.support.in_process import InProcessSystem
from worker import flow
from worker.errors import CallNotSent, CallRejected, CallResultUnknown, RateLimited, Reason
from worker.ledger import quarantine
from worker.ledger.engine import transaction
from worker.quiltt.messages import Balance

A = "acct_kept"
STEPS = ("before the job", "after the job", "after the call", "after the event", "after the resolution")


def test_payment_expires_at_its_deadline(payready: InProcessSystem) -> None:
    """Without a balance the reason is `timeout`, in the second of the deadline."""
    payready.initiate("p1", A, timeout_s=20)
    payready.run_tasks()
    payready.pass_time(19)
    assert payready.state("p1") == "waiting"
    payready.pass_time(1)
    assert payready.outcome("p1") == {
        "payment_id": "p1",
        "reason": "timeout",
        "detail": "no balance came within 20 s",
    }


def test_expiry_without_a_call_states_it(payready: InProcessSystem) -> None:
    """The detail does not name the provider as the cause."""
    payready.initiate("p1", A, timeout_s=5)
    payready.drop_tasks()
    payready.clock.advance(5)
    payready.run_maintenance()
    assert payready.outcome("p1")["detail"] == "no balance came within 5 s, and no call was made"
    assert payready.payment("p1")["refresh_id"] is None


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (CallNotSent("no connection to the provider: connect error"), "no connection to the provider: connect error"),
        (RateLimited("the provider's rate limit is reached", None), "the provider's rate limit is reached"),
        (CallResultUnknown("HTTP 500", 500), "HTTP 500"),
    ],
)
def test_expiry_after_a_failed_call_has_its_error(
    payready: InProcessSystem, error: CallNotSent | RateLimited | CallResultUnknown, detail: str
) -> None:
    """The reason is `provider_unavailable`, with the last call's error."""
    payready.provider.script[A] = [error] * 20
    payready.initiate("p1", A, timeout_s=10)
    payready.run_tasks()
    payready.pass_time(10)
    assert payready.outcome("p1") == {"payment_id": "p1", "reason": "provider_unavailable", "detail": detail}


def test_expiry_after_a_too_old_balance_is_a_timeout(payready: InProcessSystem) -> None:
    """The call succeeded, so the provider is not the cause, and the payment pays no share of it."""
    payready.initiate("p1", A, timeout_s=5)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.initiate("p2", A, timeout_s=5, max_balance_age_s=0)
    payready.drop_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.state("p1") == "released"
    payready.clock.advance(5)
    payready.drop_tasks()
    payready.run_maintenance()
    assert payready.outcome("p2")["reason"] == "timeout"
    assert payready.payment("p2")["refresh_id"] is None


@pytest.mark.parametrize("when", STEPS)
def test_redis_flush_at_any_step_loses_no_payment_and_repeats_no_call(payready: InProcessSystem, when: str) -> None:
    """The broker's queue is lost too. One call releases the payments."""

    def at(step: str) -> None:
        if step == when:
            payready.flush()
            payready.drop_tasks()
        else:
            payready.run_tasks()

    at("before the job")
    payready.initiate("p1", A, amount="25.00", timeout_s=120)
    at("after the job")
    payready.pass_time(6)  # maintenance enqueues the call again if it was lost
    assert payready.provider.calls == [A]
    at("after the call")
    payready.initiate("p2", A, amount="25.00", timeout_s=120)
    payready.run_tasks()
    payready.pass_time(6)
    assert payready.provider.calls == [A], "the account was called again while in flight"
    payready.balance(A)
    at("after the event")
    payready.pass_time(6)
    at("after the resolution")
    payready.pass_time(15)
    assert payready.outcome("p1")["state"] == "released"
    assert payready.outcome("p2")["state"] == "released"
    assert payready.provider.calls == [A]
    assert payready.fees(A) == ["1 pending", "1 posted"]


def test_claim_after_a_redis_flush_restores_the_refresh_in_flight(payready: InProcessSystem) -> None:
    """The ledger rejects a second call and restores the correlation store."""
    first = payready.initiate("p1", A)
    payready.run_tasks()
    payready.flush()
    second = payready.initiate("p2", A)
    assert second.refresh_id != first.refresh_id
    payready.run_tasks()
    assert payready.provider.calls == [A]
    assert payready.account_hash(A)["in_flight"] == first.refresh_id
    third = payready.initiate("p3", A)
    assert third.refresh_id == first.refresh_id
    assert third.follow_up.calls == []


def test_call_succeeds_while_redis_is_unavailable(payready: InProcessSystem) -> None:
    """The call is made, recorded and answered without Redis."""
    payready.initiate("p1", A)
    with payready.redis_unavailable():
        payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "1 posted"]
    payready.balance(A)
    payready.run_tasks()
    assert payready.state("p1") == "released"


def test_sweep_applies_a_balance_whose_message_was_lost(payready: InProcessSystem) -> None:
    """A stored balance is due until it is applied."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.balance(A, later=True)
    payready.drop_tasks()
    payready.pass_time(4)
    assert payready.state("p1") == "waiting"
    payready.pass_time(2)
    assert payready.state("p1") == "released"


def test_sweep_applies_an_applied_balance_to_a_newer_payment(payready: InProcessSystem) -> None:
    """The balance was applied to other payments before; its message for this payment was lost."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    payready.clock.advance(5)
    payready.initiate("p2", A, timeout_s=60)
    payready.drop_tasks()
    payready.pass_time(30)
    assert payready.state("p2") == "released"
    assert payready.provider.calls == [A]


def test_lost_call_after_an_earlier_rejection_is_made(payready: InProcessSystem) -> None:
    """A rejected call of another payment serves no later payment."""
    payready.provider.script[A] = [CallRejected(403, Reason.CONNECTION_INACTIVE, "inactive")]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert payready.state("p1") == "connection_inactive"
    payready.clock.advance(5)
    payready.initiate("p2", A, timeout_s=60)
    payready.drop_tasks()
    payready.pass_time(20)
    assert payready.provider.calls == [A, A]


def test_next_call_after_a_rejection_does_not_wait_for_its_window(
    payready: InProcessSystem,
) -> None:
    """The rejected refresh blocked the next call only while it was in flight."""
    payready.initiate("p1", A)
    payready.provider.script[A] = [lambda: _join_late(payready), 202]
    payready.run_tasks()
    assert payready.state("p1") == "connection_inactive"
    assert payready.state("p2") == "connection_inactive"
    payready.initiate("p3", A, timeout_s=20)
    payready.run_tasks()
    payready.pass_time(6)
    assert payready.provider.calls == [A, A]


def _join_late(payready: InProcessSystem) -> CallRejected:
    """Start a payment during the call that the call cannot serve."""
    payready.clock.advance(1)
    payready.initiate("p2", A, max_balance_age_s=0)
    payready.run_tasks()
    return CallRejected(403, Reason.CONNECTION_INACTIVE, "inactive")


def test_maintenance_enqueues_a_lost_call_once(payready: InProcessSystem) -> None:
    """The broker lost the message; the call is enqueued again within seconds."""
    payready.initiate("p1", A)
    payready.drop_tasks()
    payready.pass_time(4)
    assert payready.provider.calls == []
    payready.pass_time(2)
    assert payready.provider.calls == [A]
    payready.pass_time(30)
    assert payready.provider.calls == [A]


def test_call_of_a_lost_worker_stays_pending_and_is_retried_once(
    payready: InProcessSystem,
) -> None:
    """The result is unknown, so the retry follows after the grace period."""

    def die() -> int:
        raise KeyboardInterrupt

    payready.provider.script[A] = [die]
    payready.initiate("p1", A, timeout_s=300)
    with pytest.raises(KeyboardInterrupt):
        payready.run_tasks()
    payready.drop_tasks()
    assert payready.refreshes(A) == ["calling"]
    payready.pass_time(int(payready.rt.settings.max_call_duration.total_seconds()))
    assert payready.refreshes(A) == ["uncertain"]
    assert payready.fees(A) == ["1 pending"]
    payready.pass_time(16)
    assert payready.provider.calls == [A, A]
    assert payready.fees(A) == ["1 pending", "2 pending", "2 posted"]


def test_expiry_reports_more_than_one_batch(payready: InProcessSystem) -> None:
    """`has_more` requests another run."""
    count = flow.MAINTENANCE_BATCH_SIZE + 3
    for number in range(count):
        payready.initiate(f"p{number}", f"acct_{number}", timeout_s=1)
    payready.drop_tasks()
    payready.clock.advance(2)
    first = flow.expire_due_payments(payready.rt)
    assert first.has_more
    assert len(first.deliveries) == flow.MAINTENANCE_BATCH_SIZE
    second = flow.expire_due_payments(payready.rt)
    assert not second.has_more
    assert len({due.task_id for due in (*first.deliveries, *second.deliveries)}) == count


def test_requeued_quarantined_event_releases_a_waiting_payment(payready: InProcessSystem) -> None:
    """It counts as of its arrival. Other events stay in quarantine."""
    payready.initiate("pay_1", "acct_1", amount="25.00")
    payready.run_tasks()
    payready.clock.advance(3)
    flow.ingest_events(payready.rt, [], [(b"{}", "of an older version"), (b"[]", "another")])
    with transaction(payready.engine) as tx:
        [quarantined] = [row for row in quarantine.newest_events(tx, 10) if row.event == b"{}"]
    balance = Balance.model_validate(
        {
            "id": "bal_1",
            "accountId": "acct_1",
            "at": payready.clock.now.isoformat(),
            "source": "REFRESH",
            "available": Decimal(100),
            "current": None,
            "limit": None,
        }
    )
    payready.clock.advance(30)
    payready.queue.merge(flow.requeue_from_quarantine(payready.rt, quarantined, [("evt_1", balance)]))
    payready.run_tasks()
    assert payready.state("pay_1") == "released"
    assert [row["event"] for row in payready.rows("SELECT event FROM quarantine")] == [b"[]"]
