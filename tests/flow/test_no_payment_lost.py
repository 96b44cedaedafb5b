"""Invariant 2: no payment is lost, and no account in flight is called again, also after Redis was emptied."""

from decimal import Decimal

import pytest

from tests.support.in_process import InProcessSystem
from worker import flow
from worker.errors import CallNotSent, CallRejected, CallResultUnknown, FailureReason, RateLimited
from worker.ledger import quarantine
from worker.ledger.engine import transaction
from worker.quiltt.messages import Balance, BalanceWithEventId, UnparsedEvent

A = "acct_a"
STEPS = ("before the job", "after the job", "after the call", "after the event", "after the resolution")


def test_payment_fails_at_its_deadline_and_not_before(payready: InProcessSystem) -> None:
    """Without a balance the reason is `timeout`."""
    payready.initiate("p1", A, timeout_s=20)
    payready.run_tasks()
    payready.pass_time(19)
    assert payready.state_or_reason("p1") == "waiting"
    payready.pass_time(1)
    assert payready.outcome("p1") == {
        "payment_id": "p1",
        "reason": "timeout",
        "detail": "no balance arrived within 20 s",
    }


def test_expiry_without_a_call_says_in_its_detail_that_none_was_made(payready: InProcessSystem) -> None:
    """The payment has no refresh, and so no share of a fee."""
    payready.initiate("p1", A, timeout_s=5)
    payready.drop_tasks()
    payready.clock.advance(5)
    payready.run_maintenance()
    assert payready.outcome("p1")["detail"] == "no balance arrived within 5 s, and no call was made"
    assert payready.payment("p1")["refresh_id"] is None


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (CallNotSent("no connection to Quiltt: connect error"), "no connection to Quiltt: connect error"),
        (RateLimited("the provider's rate limit is reached", None), "the provider's rate limit is reached"),
        (CallResultUnknown("the provider answered 500", 500), "the provider answered 500"),
    ],
)
def test_expiry_after_failed_calls_has_reason_provider_unavailable(
    payready: InProcessSystem, error: CallNotSent | RateLimited | CallResultUnknown, detail: str
) -> None:
    """The detail is the last error of the refresh."""
    payready.provider.script[A] = [error] * 20
    payready.initiate("p1", A, timeout_s=10)
    payready.run_tasks()
    payready.pass_time(10)
    assert payready.outcome("p1") == {"payment_id": "p1", "reason": "provider_unavailable", "detail": detail}


def test_balance_too_old_for_the_payment_does_not_release_it(payready: InProcessSystem) -> None:
    """The payment expires with `timeout`, and has no share of the call's fee."""
    payready.initiate("p1", A, timeout_s=5)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.initiate("p2", A, timeout_s=5, max_balance_age_s=0)
    payready.drop_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "released"
    payready.clock.advance(5)
    payready.drop_tasks()
    payready.run_maintenance()
    assert payready.outcome("p2")["reason"] == "timeout"
    assert payready.payment("p2")["refresh_id"] is None


@pytest.mark.parametrize("flushed_at", STEPS)
def test_redis_flush_at_any_step_loses_no_payment_and_causes_no_second_call(
    payready: InProcessSystem, flushed_at: str
) -> None:
    """All enqueued messages are lost, too."""

    def run_tasks_or_flush(step: str) -> None:
        if step == flushed_at:
            payready.flush()
            payready.drop_tasks()
        else:
            payready.run_tasks()

    run_tasks_or_flush("before the job")
    payready.initiate("p1", A, amount="25.00", timeout_s=120)
    run_tasks_or_flush("after the job")
    payready.pass_time(6)  # maintenance would enqueue a lost call
    assert payready.provider.calls == [A]
    run_tasks_or_flush("after the call")
    payready.initiate("p2", A, amount="25.00", timeout_s=120)
    payready.run_tasks()
    payready.pass_time(6)
    assert payready.provider.calls == [A], "the account is in flight, and was called again"
    payready.balance(A)
    run_tasks_or_flush("after the event")
    payready.pass_time(6)
    run_tasks_or_flush("after the resolution")
    payready.pass_time(15)
    assert payready.outcome("p1")["state"] == "released"
    assert payready.outcome("p2")["state"] == "released"
    assert payready.provider.calls == [A]
    assert payready.fees(A) == ["1 pending", "1 posted"]


def test_call_restores_in_flight_refresh_after_redis_was_emptied(payready: InProcessSystem) -> None:
    """The ledger refuses a second call, and the correlation store is rebuilt from it."""
    first = payready.initiate("p1", A)
    payready.run_tasks()
    payready.flush()
    second = payready.initiate("p2", A)
    assert second.refresh_id != first.refresh_id
    payready.run_tasks()
    assert payready.provider.calls == [A]
    assert payready.account_hash(A).in_flight == first.refresh_id
    third = payready.initiate("p3", A)
    assert third.refresh_id == first.refresh_id
    assert third.follow_up.calls == []


def test_call_is_made_and_recorded_while_redis_is_unavailable(payready: InProcessSystem) -> None:
    """Its balance then releases the payment."""
    payready.initiate("p1", A)
    with payready.redis_unavailable():
        payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "1 posted"]
    payready.balance(A)
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "released"


def test_sweep_applies_balance_after_its_message_was_lost(payready: InProcessSystem) -> None:
    """A stored balance is due until it is applied."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.balance(A, stored_only=True)
    payready.drop_tasks()
    payready.pass_time(4)
    assert payready.state_or_reason("p1") == "waiting"
    payready.pass_time(2)
    assert payready.state_or_reason("p1") == "released"


def test_maintenance_applies_reused_balance_after_its_message_was_lost(payready: InProcessSystem) -> None:
    """The balance was applied to an earlier payment before."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    payready.clock.advance(5)
    payready.initiate("p2", A, timeout_s=60)
    payready.drop_tasks()
    payready.pass_time(30)
    assert payready.state_or_reason("p2") == "released"
    assert payready.provider.calls == [A]


def test_maintenance_makes_a_lost_call_after_an_earlier_rejection(payready: InProcessSystem) -> None:
    """A rejection of another payment's call does not affect later payments."""
    payready.provider.script[A] = [CallRejected(403, FailureReason.CONNECTION_INACTIVE, "inactive")]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "connection_inactive"
    payready.clock.advance(5)
    payready.initiate("p2", A, timeout_s=60)
    payready.drop_tasks()
    payready.pass_time(20)
    assert payready.provider.calls == [A, A]


def test_call_after_a_rejection_does_not_wait_for_the_window(
    payready: InProcessSystem,
) -> None:
    """A call was queued behind the rejected one, and fails with it. The next call is made at once."""
    payready.initiate("p1", A)
    payready.provider.script[A] = [lambda: _reject_after_another_job(payready), 202]
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "connection_inactive"
    assert payready.state_or_reason("p2") == "connection_inactive"
    payready.initiate("p3", A, timeout_s=20)
    payready.run_tasks()
    payready.pass_time(6)
    assert payready.provider.calls == [A, A]


def _reject_after_another_job(payready: InProcessSystem) -> CallRejected:
    """Initiate a payment that the call in flight cannot serve. Then reject the call."""
    payready.clock.advance(1)
    payready.initiate("p2", A, max_balance_age_s=0)
    payready.run_tasks()
    return CallRejected(403, FailureReason.CONNECTION_INACTIVE, "inactive")


def test_maintenance_makes_a_lost_call(payready: InProcessSystem) -> None:
    """Its message was lost with the broker. It is enqueued again after 5 s, once."""
    payready.initiate("p1", A)
    payready.drop_tasks()
    payready.pass_time(4)
    assert payready.provider.calls == []
    payready.pass_time(2)
    assert payready.provider.calls == [A]
    payready.pass_time(30)
    assert payready.provider.calls == [A]


def test_call_of_a_killed_worker_stays_pending_and_is_repeated_once(
    payready: InProcessSystem,
) -> None:
    """Its result is unknown, so one more call follows after the grace period."""

    def die() -> int:
        raise KeyboardInterrupt

    payready.provider.script[A] = [die]
    payready.initiate("p1", A, timeout_s=300)
    with pytest.raises(KeyboardInterrupt):
        payready.run_tasks()
    payready.drop_tasks()
    assert payready.refreshes(A) == ["calling"]
    payready.pass_time(int(payready.rt.settings.max_call_and_record_duration.total_seconds()))
    assert payready.refreshes(A) == ["uncertain"]
    assert payready.fees(A) == ["1 pending"]
    payready.pass_time(16)
    assert payready.provider.calls == [A, A]
    assert payready.fees(A) == ["1 pending", "2 pending", "2 posted"]


def test_maintenance_expires_any_number_of_payments(payready: InProcessSystem) -> None:
    """There is more than one batch: `has_more` requests the next one."""
    count = flow.MAINTENANCE_BATCH_SIZE + 3
    for number in range(count):
        payready.initiate(f"p{number}", f"acct_{number}", timeout_s=1)
    payready.drop_tasks()
    payready.clock.advance(2)
    first = flow.expire_poll_or_rejoin_due_payments(payready.rt)
    assert first.has_more
    assert len(first.follow_up.deliveries) == flow.MAINTENANCE_BATCH_SIZE
    second = flow.expire_poll_or_rejoin_due_payments(payready.rt)
    assert not second.has_more
    assert len({due.task_id for due in (*first.follow_up.deliveries, *second.follow_up.deliveries)}) == count


def test_replayed_event_releases_waiting_payment(payready: InProcessSystem) -> None:
    """It counts from its arrival. Other events stay quarantined."""
    payready.initiate("pay_1", "acct_1", amount="25.00")
    payready.run_tasks()
    payready.clock.advance(3)
    unparsed = [UnparsedEvent(raw=b"{}", reason="of an older version"), UnparsedEvent(raw=b"[]", reason="another")]
    flow.ingest_events_and_resolve_payments(payready.rt, [], unparsed)
    with transaction(payready.engine) as tx:
        [replayed] = [event for event in quarantine.newest_events(tx, 10) if event.event == b"{}"]
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
    payready.queue.add(
        flow.store_balances_and_delete_quarantined(
            payready.rt, replayed, [BalanceWithEventId(event_id="evt_1", balance=balance)]
        )
    )
    payready.run_tasks()
    assert payready.state_or_reason("pay_1") == "released"
    assert [row["event"] for row in payready.rows("SELECT event FROM quarantine")] == [b"[]"]


def test_lost_redis_operation_is_logged_by_name(payready: InProcessSystem, caplog: pytest.LogCaptureFixture) -> None:
    payready.initiate("p1", "acct_polled", profile_id="p_1", timeout_s=60)
    payready.run_tasks()
    payready.clock.advance(50)
    payready.initiate("p2", A)
    payready.drop_tasks()
    payready.clock.advance(6)
    with payready.redis_unavailable():
        flow.expire_poll_or_rejoin_due_payments(payready.rt)
    events = [record.msg for record in caplog.records if isinstance(record.msg, dict)]
    operations = [event["operation"] for event in events if event["event"] == "redis.unavailable"]
    assert operations == ["reserve_poll_slots", "restore_account", "join_refresh"]
