"""Payments and their outcome deliveries: a resolution is final, and a delivery is claimed once."""

from datetime import timedelta

import pytest
from sqlalchemy.exc import IntegrityError

from tests.support.in_process import START
from worker.ledger import outcome_deliveries, payment_connections, payments
from worker.ledger.engine import Engine, Tx, transaction
from worker.ledger.locks import JobIds
from worker.ledger.outcome_deliveries import NewDelivery
from worker.ledger.payments import Resolution
from worker.rules.connections import AccountMoved, ConnectionLost, ConnectionUpdate
from worker.rules.job import parse_job
from worker.rules.states import PAYMENT_TRANSITIONS, PaymentEvent, PaymentState


def record(tx: Tx, payment_id: str, *, seconds: float = 0, **more: str) -> None:
    """Insert a waiting payment with one task."""
    job = parse_job(
        {"payment_id": payment_id, "account_id": "acct_1", "timeout_s": 60, **more}, required_currency="USD"
    )
    payments.insert_payments(tx, [payments.new_payment(job, START + timedelta(seconds=seconds))])
    register(tx, payment_id, f"task_{payment_id}")


def register(tx: Tx, payment_id: str, task_id: str) -> None:
    """Register a task for the outcome of a waiting payment."""
    task = NewDelivery(payment_id=payment_id, continuation={"id": task_id}, due_at=None)
    outcome_deliveries.register_deliveries(tx, [task])


def resolution(payment_id: str, event: PaymentEvent = PaymentEvent.FUNDS_SUFFICIENT) -> Resolution:
    """Return a resolution by this event."""
    return Resolution(payment_id=payment_id, event=event, outcome={"event": event.value}, resolved_at=START)


@pytest.mark.parametrize("event", PaymentEvent)
def test_payment_gets_the_state_of_the_transition_table(engine: Engine, event: PaymentEvent) -> None:
    with transaction(engine) as tx:
        record(tx, "p1")
        [due] = payments.resolve(tx, [resolution("p1", event)], START).result()
        ids = JobIds(account_id="acct_1", payment_id="p1", task_id="task_p1")
        [stored] = payments.lock_payments_of_jobs(tx, [ids]).result().values()
    assert due.state == stored.state == PAYMENT_TRANSITIONS[PaymentState.WAITING, event]


def test_second_resolution_changes_and_delivers_nothing(engine: Engine) -> None:
    """The update is conditional on the state, so it is safe even without a row lock."""
    with transaction(engine) as tx:
        record(tx, "p1")
        record(tx, "p2")
        assert len(payments.resolve(tx, [resolution("p1")], START).result()) == 1
        second = [resolution(payment_id, PaymentEvent.EXPIRED) for payment_id in ("p1", "p2")]
        late = START + timedelta(seconds=1)
        assert [due.task_id for due in payments.resolve(tx, second, late).result()] == ["task_p2"]
        [first, other] = outcome_deliveries.claim_overdue(tx, late + outcome_deliveries.REDELIVER_AFTER, 10).result()
    assert (first.task_id, first.state, first.outcome["event"]) == (
        "task_p1",
        PaymentState.RELEASED,
        "funds sufficient",
    )
    assert (other.task_id, other.state) == ("task_p2", PaymentState.FAILED)


def test_payment_is_inserted_once(engine: Engine) -> None:
    job = parse_job({"payment_id": "p1", "account_id": "acct_1"}, required_currency="USD")
    with transaction(engine) as tx:
        payments.insert_payments(tx, [payments.new_payment(job, START)])
    with pytest.raises(IntegrityError), transaction(engine) as tx:
        payments.insert_payments(tx, [payments.new_payment(job, START + timedelta(seconds=9))])
    with transaction(engine) as tx:
        [waiting] = payments.lock_waiting(tx, ["p1"])
    assert waiting.requested_at == START


def test_waiting_payments_are_sorted_by_request_time(engine: Engine) -> None:
    """Not by id: the funds cover the earliest payment first."""
    with transaction(engine) as tx:
        for payment_id, seconds in (("a", 2), ("b", 0), ("c", 1)):
            record(tx, payment_id, seconds=seconds)
        waiting = payments.lock_waiting_by_account(tx, ["acct_1"]).result()
    assert [payment.payment_id for payment in waiting["acct_1"]] == ["b", "c", "a"]


def test_outcome_is_due_until_marked_delivered(engine: Engine) -> None:
    """A claimed delivery is not claimed again before `REDELIVER_AFTER`."""
    with transaction(engine) as tx:
        record(tx, "p1")
        assert outcome_deliveries.claim_overdue(tx, START + timedelta(days=1), 10).result() == []
        [due] = payments.resolve(tx, [resolution("p1")], START).result()
        assert (due.task_id, due.state) == ("task_p1", PaymentState.RELEASED)
        assert outcome_deliveries.claim_overdue(tx, START, 10).result() == []
        late = START + outcome_deliveries.REDELIVER_AFTER
        assert [due.task_id for due in outcome_deliveries.claim_overdue(tx, late, 10).result()] == ["task_p1"]
        assert outcome_deliveries.claim_overdue(tx, late, 10).result() == []
        assert [
            due.task_id
            for due in outcome_deliveries.claim_overdue(tx, late + outcome_deliveries.REDELIVER_AFTER, 10).result()
        ] == ["task_p1"]
        outcome_deliveries.mark_delivered(tx, {"task_p1": late})
        assert outcome_deliveries.claim_overdue(tx, late + timedelta(days=1), 10).result() == []


def test_claim_is_renewed_until_it_is_lost(engine: Engine) -> None:
    """Another process claimed or delivered the outcome, or it was made due again."""
    claim = outcome_deliveries.REDELIVER_AFTER
    with transaction(engine) as tx:
        for payment_id in ("p1", "p2", "p3", "p4"):
            record(tx, payment_id)
        resolutions = [resolution(payment_id) for payment_id in ("p1", "p2", "p3", "p4")]
        claimed = payments.resolve(tx, resolutions, START).result()
        assert {due.claimed_until for due in claimed} == {START + claim}
        renewed = outcome_deliveries.renew_claims(tx, claimed, START + claim / 2)
        assert [due.claimed_until for due in renewed] == [START + claim * 1.5] * 4
        assert outcome_deliveries.claim_overdue(tx, START + claim, 10).result() == []
        [by_sweep] = outcome_deliveries.claim_overdue(tx, START + claim * 2, 1).result()
        left = [due.task_id for due in renewed if due.task_id != by_sweep.task_id]
        outcome_deliveries.mark_delivered(tx, {left[0]: START})
        outcome_deliveries.make_outcomes_due_again(tx, [left[1].removeprefix("task_")], START)
        again = outcome_deliveries.renew_claims(tx, renewed, START + claim * 2)
        assert [due.task_id for due in again] == [left[2]]
        assert outcome_deliveries.renew_claims(tx, [by_sweep], START + claim * 2) == [by_sweep]


def test_waiting_payment_is_due_for_check_after_request_and_at_next_check(engine: Engine) -> None:
    with transaction(engine) as tx:
        record(tx, "p1")
        assert payments.lock_due(tx, START + timedelta(seconds=4), 10).result() == []
        assert len(payments.lock_due(tx, START + payments.FIRST_CHECK_AFTER, 10).result()) == 1
        payments.set_next_checks_of_locked(tx, {"p1": START + timedelta(seconds=60)})
        assert payments.lock_due(tx, START + timedelta(seconds=59), 10).result() == []
        assert len(payments.lock_due(tx, START + timedelta(seconds=60), 10).result()) == 1


def test_payment_is_found_by_each_of_its_tasks(engine: Engine) -> None:
    """An unknown task is ignored."""
    with transaction(engine) as tx:
        record(tx, "p1")
        register(tx, "p1", "task_again")
        assert outcome_deliveries.payments_of_tasks(tx, ["task_p1", "task_again", "task_unknown"]) == ["p1"]


def test_all_payments_of_connection_updates_are_locked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if they need several statements. So no two transactions deadlock."""
    if engine.dialect.name == "sqlite":
        return  # it has one writer at a time
    monkeypatch.setattr(payment_connections, "IDS_PER_STATEMENT", 5)
    numbers = range(2 * payment_connections.IDS_PER_STATEMENT + 2)
    updates: list[ConnectionUpdate] = [
        AccountMoved(account_id=f"acct_a{n}", connection_id="conn_x", at=START) for n in numbers
    ]
    updates += [ConnectionLost(detail="", at=START, connection_id=f"conn_{n}") for n in numbers]
    updates += [ConnectionLost(detail="", at=START, profile_id=f"p_{n}") for n in numbers]
    with transaction(engine) as tx:
        for n in numbers:
            record(tx, f"a{n}", account_id=f"acct_a{n}")
            record(tx, f"c{n}", connection_id=f"conn_{n}")
            record(tx, f"p{n}", profile_id=f"p_{n}")
        record(tx, "other", connection_id="conn_other", profile_id="p_other")
    with transaction(engine) as tx, transaction(engine) as other:
        payment_connections.lock_payments_of_updates(tx, updates)
        unlocked = payments.lock_due(other, START + timedelta(days=1), 100).result()
        assert [waiting.payment_id for waiting in unlocked] == ["other"]


def test_delivery_claimed_by_sweep_is_not_claimed_by_task(engine: Engine) -> None:
    """The sweep ran before the message that asks for the delivery."""
    with transaction(engine) as tx:
        record(tx, "p1")
        record(tx, "p2")
        payments.resolve(tx, [resolution(payment_id) for payment_id in ("p1", "p2")], START)
        late = START + outcome_deliveries.REDELIVER_AFTER
        assert [due.task_id for due in outcome_deliveries.claim_overdue(tx, late, 1).result()] == ["task_p1"]
        assert [
            due.task_id
            for due in outcome_deliveries.claim_undelivered_and_unclaimed(tx, ["task_p1", "task_p2"], late).result()
        ] == ["task_p2"]
        assert outcome_deliveries.claim_undelivered_and_unclaimed(tx, ["task_p1", "task_p2"], late).result() == []
        assert outcome_deliveries.claim_overdue(tx, late, 10).result() == []
