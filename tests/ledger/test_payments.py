"""Payments in the ledger: a resolved payment never changes."""

from datetime import timedelta

import pytest

from tests.support.in_process import START
from worker.ledger import outcome_deliveries, payments
from worker.ledger.engine import Engine, Tx, transaction
from worker.ledger.payments import Resolution
from worker.rules.connections import AccountMoved, ConnectionLost, ConnectionUpdate
from worker.rules.job import parse_job
from worker.rules.states import PaymentState


def record(tx: Tx, payment_id: str, *, seconds: float = 0, **more: str) -> None:
    """Insert a waiting payment with one outcome delivery."""
    job = parse_job({"payment_id": payment_id, "account_id": "acct_1", "timeout_s": 60, **more}, currency="USD")
    assert payments.insert_payments(tx, [job], START + timedelta(seconds=seconds)) == {payment_id}
    outcome_deliveries.register_deliveries(tx, [(payment_id, {"id": f"task_{payment_id}"})], due_at=None)


def resolution(payment_id: str, state: PaymentState) -> Resolution:
    """Return a resolution with this state."""
    return Resolution(payment_id, state, {"payment_id": payment_id, "state": state.value}, START)


def test_first_resolution_is_final(engine: Engine) -> None:
    """The update is conditional, so a second one changes nothing even without a row lock."""
    with transaction(engine) as tx:
        record(tx, "p1")
        payments.resolve(tx, [resolution("p1", PaymentState.RELEASED)])
        payments.resolve(tx, [resolution("p1", PaymentState.FAILED)])
        [due] = outcome_deliveries.claim_overdue(tx, START + outcome_deliveries.REDELIVER_AFTER, 10)
    assert (due.state, due.outcome["state"]) == (PaymentState.RELEASED, "released")


def test_insert_skips_a_known_payment(engine: Engine) -> None:
    job = parse_job({"payment_id": "p1", "account_id": "acct_1"}, currency="USD")
    with transaction(engine) as tx:
        assert payments.insert_payments(tx, [job, job], START) == {"p1"}
        assert not payments.insert_payments(tx, [job], START + timedelta(seconds=9))
        [waiting] = payments.lock_waiting(tx, ["p1"])
    assert waiting.requested_at == START


def test_waiting_payments_are_ordered_by_request_time(engine: Engine) -> None:
    """The earliest payment is covered first, whatever its id."""
    with transaction(engine) as tx:
        for payment_id, seconds in (("a", 2), ("b", 0), ("c", 1)):
            record(tx, payment_id, seconds=seconds)
        assert [waiting.payment_id for waiting in payments.lock_waiting_by_account(tx, ["acct_1"])["acct_1"]] == [
            "b",
            "c",
            "a",
        ]


def test_outcome_is_overdue_until_it_is_marked_delivered(engine: Engine) -> None:
    """A claim prevents a second claim until it expires."""
    with transaction(engine) as tx:
        record(tx, "p1")
        assert outcome_deliveries.claim_overdue(tx, START + timedelta(days=1), 10) == []
        [due] = payments.resolve(tx, [resolution("p1", PaymentState.RELEASED)])
        assert (due.task_id, due.outcome["state"]) == ("task_p1", "released")
        assert outcome_deliveries.claim_overdue(tx, START, 10) == []
        late = START + outcome_deliveries.REDELIVER_AFTER
        assert [due.task_id for due in outcome_deliveries.claim_overdue(tx, late, 10)] == ["task_p1"]
        assert outcome_deliveries.claim_overdue(tx, late, 10) == []
        assert [
            due.task_id for due in outcome_deliveries.claim_overdue(tx, late + outcome_deliveries.REDELIVER_AFTER, 10)
        ] == ["task_p1"]
        outcome_deliveries.mark_delivered(tx, {"task_p1": late})
        assert outcome_deliveries.claim_overdue(tx, late + timedelta(days=1), 10) == []


def test_maintenance_checks_a_waiting_payment_at_its_due_time(engine: Engine) -> None:
    """The first check follows the request; `set_next_checks` sets the next one."""
    with transaction(engine) as tx:
        record(tx, "p1")
        assert payments.lock_due(tx, START + timedelta(seconds=4), 10) == []
        assert len(payments.lock_due(tx, START + payments.FIRST_CHECK_AFTER, 10)) == 1
        payments.set_next_checks(tx, {"p1": START + timedelta(seconds=60)})
        assert payments.lock_due(tx, START + timedelta(seconds=59), 10) == []
        assert len(payments.lock_due(tx, START + timedelta(seconds=60), 10)) == 1


def test_payments_of_tasks_finds_known_tasks(engine: Engine) -> None:
    with transaction(engine) as tx:
        record(tx, "p1")
        outcome_deliveries.register_deliveries(tx, [("p1", {"id": "task_again"})], due_at=None)
        assert outcome_deliveries.payments_of_tasks(tx, ["task_p1", "task_again", "task_unknown"]) == ["p1"]


def test_lock_affected_locks_every_payment_of_many_updates(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other transaction locks one of them meanwhile, so no deadlock is possible."""
    if engine.dialect.name == "sqlite":
        return  # it has one writer at a time
    monkeypatch.setattr(payments, "IDS_PER_STATEMENT", 5)
    numbers = range(2 * payments.IDS_PER_STATEMENT + 2)
    updates: list[ConnectionUpdate] = [AccountMoved(f"acct_a{n}", "conn_x", START) for n in numbers]
    updates += [ConnectionLost("", START, connection_id=f"conn_{n}") for n in numbers]
    updates += [ConnectionLost("", START, profile_id=f"p_{n}") for n in numbers]
    with transaction(engine) as tx:
        for n in numbers:
            record(tx, f"a{n}", account_id=f"acct_a{n}")
            record(tx, f"c{n}", connection_id=f"conn_{n}")
            record(tx, f"p{n}", profile_id=f"p_{n}")
        record(tx, "other", connection_id="conn_other", profile_id="p_other")
    with transaction(engine) as tx, transaction(engine) as other:
        payments.lock_affected(tx, updates)
        free = payments.lock_due(other, START + timedelta(days=1), 100)
        assert [waiting.payment_id for waiting in free] == ["other"]


def test_claimed_outcome_is_not_claimed_again(engine: Engine) -> None:
    """The sweep may claim an outcome before the delivery message does."""
    with transaction(engine) as tx:
        record(tx, "p1")
        record(tx, "p2")
        payments.resolve(tx, [resolution(payment_id, PaymentState.RELEASED) for payment_id in ("p1", "p2")])
        late = START + outcome_deliveries.REDELIVER_AFTER
        assert [due.task_id for due in outcome_deliveries.claim_overdue(tx, late, 1)] == ["task_p1"]
        assert [due.task_id for due in outcome_deliveries.claim_undelivered(tx, ["task_p1", "task_p2"], late)] == [
            "task_p2"
        ]
        assert outcome_deliveries.claim_undelivered(tx, ["task_p1", "task_p2"], late) == []
        assert outcome_deliveries.claim_overdue(tx, late, 10) == []
