"""Invariant 2: no payment is forgotten, and Redis may be emptied: no account in flight is charged again."""

from decimal import Decimal

import pytest

from tests.support.in_process import InProcessSystem
from worker import flow
from worker.errors import CallNotSent, CallRejected, CallResultUnknown, FailureReason, RateLimited
from worker.ledger import quarantine
from worker.ledger.engine import transaction
from worker.quiltt.messages import Balance, BalanceWithEventId, UnparsedEvent

A = "acct_kept"
STEPS = ("before the job", "after the job", "after the call", "after the event", "after the end")


def test_a_payment_fails_at_its_deadline_and_not_before(payready: InProcessSystem) -> None:
    """Nothing came: `timeout`, in the second of the deadline."""
    payready.initiate("p1", A, timeout_s=20)
    payready.run_tasks()
    payready.pass_time(19)
    assert payready.state("p1") == "waiting"
    payready.pass_time(1)
    assert payready.outcome("p1") == {
        "payment_id": "p1",
        "reason": "timeout",
        "detail": "no balance arrived within 20 s",
    }


def test_a_deadline_without_a_call_says_so(payready: InProcessSystem) -> None:
    """When no worker made the call, the provider is not blamed."""
    payready.initiate("p1", A, timeout_s=5)
    payready.drop_tasks()
    payready.clock.advance(5)
    payready.run_maintenance()
    assert payready.outcome("p1")["detail"] == "no balance arrived within 5 s, and no call was made"
    assert payready.payment("p1")["refresh_id"] is None


@pytest.mark.parametrize(
    ("trouble", "detail"),
    [
        (CallNotSent("no connection to the provider: connect error"), "no connection to the provider: connect error"),
        (RateLimited("the provider's rate limit is reached", None), "the provider's rate limit is reached"),
        (CallResultUnknown("the provider answered 500", 500), "the provider answered 500"),
    ],
)
def test_trouble_with_the_provider_is_the_reason_at_the_deadline(
    payready: InProcessSystem, trouble: CallNotSent | RateLimited | CallResultUnknown, detail: str
) -> None:
    """`provider_unavailable`, with what the last call met with."""
    payready.provider.script[A] = [trouble] * 20
    payready.initiate("p1", A, timeout_s=10)
    payready.run_tasks()
    payready.pass_time(10)
    assert payready.outcome("p1") == {"payment_id": "p1", "reason": "provider_unavailable", "detail": detail}


def test_balance_too_old_for_the_payment_does_not_release_it(payready: InProcessSystem) -> None:
    """The call that came back is not the provider's trouble, and nothing of its fee falls to the payment."""
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
def test_redis_emptied_at_any_moment_loses_nothing_and_charges_nothing_twice(
    payready: InProcessSystem, when: str
) -> None:
    """All that was enqueued is gone as well: the payment is released, by one call."""

    def at(step: str) -> None:
        if step == when:
            payready.flush()
            payready.drop_tasks()
        else:
            payready.run_tasks()

    at("before the job")
    payready.initiate("p1", A, amount="25.00", timeout_s=120)
    at("after the job")
    payready.pass_time(6)  # maintenance would enqueue a lost call
    assert payready.provider.calls == [A]
    at("after the call")
    payready.initiate("p2", A, amount="25.00", timeout_s=120)
    payready.run_tasks()
    payready.pass_time(6)
    assert payready.provider.calls == [A], "the account is in flight, and was charged again"
    payready.balance(A)
    at("after the event")
    payready.pass_time(6)
    at("after the end")
    payready.pass_time(15)
    assert payready.outcome("p1")["state"] == "released"
    assert payready.outcome("p2")["state"] == "released"
    assert payready.provider.calls == [A]
    assert payready.fees(A) == ["1 pending", "1 posted"]


def test_after_redis_was_emptied_the_next_call_restores_who_is_in_flight(payready: InProcessSystem) -> None:
    """The ledger refuses a second call, and the correlation store is rebuilt from it."""
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


def test_redis_away_while_a_call_is_made_costs_speed_only(payready: InProcessSystem) -> None:
    """The call is made, booked, and answered without it."""
    payready.initiate("p1", A)
    with payready.redis_unavailable():
        payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "1 posted"]
    payready.balance(A)
    payready.run_tasks()
    assert payready.state("p1") == "released"


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


def test_an_event_whose_application_was_lost_is_applied_by_the_sweep(payready: InProcessSystem) -> None:
    """A kept balance is due until it was applied."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.balance(A, later=True)
    payready.drop_tasks()
    payready.pass_time(4)
    assert payready.state("p1") == "waiting"
    payready.pass_time(2)
    assert payready.state("p1") == "released"


def test_a_payment_that_found_a_balance_is_released_though_its_application_was_lost(payready: InProcessSystem) -> None:
    """The balance was applied before to other payments; maintenance applies it to later ones."""
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


def test_a_call_that_was_lost_after_an_earlier_refusal_is_made(payready: InProcessSystem) -> None:
    """A rejection of another payment's call does not affect later payments."""
    payready.provider.script[A] = [CallRejected(403, FailureReason.CONNECTION_INACTIVE, "inactive")]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert payready.state("p1") == "connection_inactive"
    payready.clock.advance(5)
    payready.initiate("p2", A, timeout_s=60)
    payready.drop_tasks()
    payready.pass_time(20)
    assert payready.provider.calls == [A, A]


def test_who_joins_the_next_call_after_a_refusal_does_not_wait_for_the_refused_ones_window(
    payready: InProcessSystem,
) -> None:
    """The next call was queued behind the rejected one, and is made now."""
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
    """While the call is on the wire a payment comes that it cannot serve."""
    payready.clock.advance(1)
    payready.initiate("p2", A, max_balance_age_s=0)
    payready.run_tasks()
    return CallRejected(403, FailureReason.CONNECTION_INACTIVE, "inactive")


def test_maintenance_makes_a_lost_call(payready: InProcessSystem) -> None:
    """The message to call was lost with the broker: within seconds it is enqueued again, and once only."""
    payready.initiate("p1", A)
    payready.drop_tasks()
    payready.pass_time(4)
    assert payready.provider.calls == []
    payready.pass_time(2)
    assert payready.provider.calls == [A]
    payready.pass_time(30)
    assert payready.provider.calls == [A]


def test_a_worker_lost_in_the_middle_of_a_call_leaves_it_pending_and_once_more_is_tried(
    payready: InProcessSystem,
) -> None:
    """The result of the call is unknown: its fee entry stays pending, and one more call follows a grace period."""

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
    """More than a batch: `more` says that the step is to be repeated."""
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


def test_a_payment_is_released_by_an_event_that_was_not_understood_when_it_came(payready: InProcessSystem) -> None:
    """A requeued event counts from its arrival and releases waiting payments; other events stay quarantined."""
    payready.initiate("pay_1", "acct_1", amount="25.00")
    payready.run_tasks()
    payready.clock.advance(3)
    unparsed = [UnparsedEvent(raw=b"{}", reason="of an older version"), UnparsedEvent(raw=b"[]", reason="another")]
    flow.ingest_events_and_resolve_payments(payready.rt, [], unparsed)
    with transaction(payready.engine) as tx:
        [kept] = [kept for kept in quarantine.newest_events(tx, 10) if kept.event == b"{}"]
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
            payready.rt, kept, [BalanceWithEventId(event_id="evt_1", balance=balance)]
        )
    )
    payready.run_tasks()
    assert payready.state("pay_1") == "released"
    assert [row["event"] for row in payready.rows("SELECT event FROM quarantine")] == [b"[]"]
