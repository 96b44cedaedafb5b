"""Payments in the ledger: what is settled stays as it is, whoever writes."""

from datetime import timedelta

import pytest

from tests.support.in_process import START
from worker.ledger import outcome_deliveries, payments
from worker.ledger.engine import Engine, Tx, transaction
from worker.ledger.outcome_deliveries import NewDelivery
from worker.ledger.payments import Resolution
from worker.rules.connections import AccountMoved, ConnectionLost, ConnectionUpdate
from worker.rules.job import parse_job
from worker.rules.states import PaymentState


def record(tx: Tx, payment_id: str, *, seconds: float = 0, **more: str) -> None:
    """A payment that waits, with a task that waits for it."""
    job = parse_job({"payment_id": payment_id, "account_id": "acct_1", "timeout_s": 60, **more}, currency="USD")
    assert set(payments.insert_payments(tx, [job], START + timedelta(seconds=seconds))) == {payment_id}
    register(tx, payment_id, f"task_{payment_id}")


def register(tx: Tx, payment_id: str, task_id: str) -> None:
    """Register a task for the outcome of a waiting payment."""
    task = NewDelivery(payment_id=payment_id, continuation={"id": task_id}, due_at=None)
    outcome_deliveries.register_deliveries(tx, [task])


def settlement(payment_id: str, state: PaymentState) -> Resolution:
    """How it ends."""
    outcome = {"payment_id": payment_id, "state": state.value}
    return Resolution(payment_id=payment_id, state=state, outcome=outcome, resolved_at=START)


def test_the_first_settlement_stays(engine: Engine) -> None:
    """The write itself is conditional: a second one changes nothing, even from who forgot to hold the payment."""
    with transaction(engine) as tx:
        record(tx, "p1")
        payments.resolve(tx, [settlement("p1", PaymentState.RELEASED)])
        payments.resolve(tx, [settlement("p1", PaymentState.FAILED)])
        [due] = outcome_deliveries.claim_overdue(tx, START + outcome_deliveries.REDELIVER_AFTER, 10)
    assert (due.state, due.outcome["state"]) == (PaymentState.RELEASED, "released")


def test_a_payment_is_recorded_once(engine: Engine) -> None:
    """A second time nothing is written."""
    job = parse_job({"payment_id": "p1", "account_id": "acct_1"}, currency="USD")
    with transaction(engine) as tx:
        assert set(payments.insert_payments(tx, [job, job], START)) == {"p1"}
        assert not payments.insert_payments(tx, [job], START + timedelta(seconds=9))
        [waiting] = payments.lock_waiting(tx, ["p1"])
    assert waiting.requested_at == START


def test_those_who_wait_come_in_the_order_of_their_requests(engine: Engine) -> None:
    """Not in that of their names: who asked first is covered first."""
    with transaction(engine) as tx:
        for payment_id, seconds in (("a", 2), ("b", 0), ("c", 1)):
            record(tx, payment_id, seconds=seconds)
        assert [waiting.payment_id for waiting in payments.lock_waiting_by_account(tx, ["acct_1"])["acct_1"]] == [
            "b",
            "c",
            "a",
        ]


def test_an_outcome_is_due_until_it_is_noted_as_delivered(engine: Engine) -> None:
    """And while somebody delivers it, nobody else is given it."""
    with transaction(engine) as tx:
        record(tx, "p1")
        assert outcome_deliveries.claim_overdue(tx, START + timedelta(days=1), 10) == []
        [due] = payments.resolve(tx, [settlement("p1", PaymentState.RELEASED)])
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


def test_what_upkeep_does_not_settle_it_looks_at_again_later(engine: Engine) -> None:
    """Soon after the request, then when it was told to."""
    with transaction(engine) as tx:
        record(tx, "p1")
        assert payments.lock_due(tx, START + timedelta(seconds=4), 10) == []
        assert len(payments.lock_due(tx, START + payments.FIRST_CHECK_AFTER, 10)) == 1
        payments.set_next_checks(tx, {"p1": START + timedelta(seconds=60)})
        assert payments.lock_due(tx, START + timedelta(seconds=59), 10) == []
        assert len(payments.lock_due(tx, START + timedelta(seconds=60), 10)) == 1


def test_the_tasks_of_a_payment_lead_to_it(engine: Engine) -> None:
    """And a task that nobody knows leads nowhere."""
    with transaction(engine) as tx:
        record(tx, "p1")
        register(tx, "p1", "task_again")
        assert outcome_deliveries.payments_of_tasks(tx, ["task_p1", "task_again", "task_unknown"]) == ["p1"]


def test_all_that_news_concerns_is_held_however_much_it_is(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else gets hold of any of it meanwhile, and so no two transactions wait for each other half-way."""
    if engine.dialect.name == "sqlite":
        return  # it has one writer at a time
    monkeypatch.setattr(payments, "IDS_PER_STATEMENT", 5)
    numbers = range(2 * payments.IDS_PER_STATEMENT + 2)
    news: list[ConnectionUpdate] = [
        AccountMoved(account_id=f"acct_a{n}", connection_id="conn_x", at=START) for n in numbers
    ]
    news += [ConnectionLost(detail="", at=START, connection_id=f"conn_{n}") for n in numbers]
    news += [ConnectionLost(detail="", at=START, profile_id=f"p_{n}") for n in numbers]
    with transaction(engine) as tx:
        for n in numbers:
            record(tx, f"a{n}", account_id=f"acct_a{n}")
            record(tx, f"c{n}", connection_id=f"conn_{n}")
            record(tx, f"p{n}", profile_id=f"p_{n}")
        record(tx, "other", connection_id="conn_other", profile_id="p_other")
    with transaction(engine) as tx, transaction(engine) as other:
        payments.lock_affected(tx, news)
        free = payments.lock_due(other, START + timedelta(days=1), 100)
        assert [waiting.payment_id for waiting in free] == ["other"]


def test_an_outcome_that_somebody_else_was_given_is_not_delivered_beside_it(engine: Engine) -> None:
    """The sweep was quicker than the message that asks for it: whoever comes second leaves it."""
    with transaction(engine) as tx:
        record(tx, "p1")
        record(tx, "p2")
        payments.resolve(tx, [settlement(payment_id, PaymentState.RELEASED) for payment_id in ("p1", "p2")])
        late = START + outcome_deliveries.REDELIVER_AFTER
        assert [due.task_id for due in outcome_deliveries.claim_overdue(tx, late, 1)] == ["task_p1"]
        assert [due.task_id for due in outcome_deliveries.claim_undelivered(tx, ["task_p1", "task_p2"], late)] == [
            "task_p2"
        ]
        assert outcome_deliveries.claim_undelivered(tx, ["task_p1", "task_p2"], late) == []
        assert outcome_deliveries.claim_overdue(tx, late, 10) == []
