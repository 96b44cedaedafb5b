"""Payments in the ledger: what is settled stays as it is, whoever writes."""

from datetime import timedelta

import pytest

from tests.support.world import START
from worker.ledger import payments
from worker.ledger.database import Engine, Tx, transaction
from worker.ledger.payments import Settlement
from worker.messages import Breakdown, News, Relink, parse_job
from worker.payment import PaymentState


def record(tx: Tx, payment_id: str, *, seconds: float = 0, **more: str) -> None:
    """A payment that waits, with a task that waits for it."""
    job = parse_job({"payment_id": payment_id, "account_id": "acct_1", "timeout_s": 60, **more}, currency="USD")
    assert payments.record(tx, [job], START + timedelta(seconds=seconds)) == {payment_id}
    payments.await_outcomes(tx, [(payment_id, {"id": f"task_{payment_id}"})], due_at=None)


def settlement(payment_id: str, state: PaymentState) -> Settlement:
    """How it ends."""
    return Settlement(payment_id, state, {"payment_id": payment_id, "state": state.value}, START)


def test_the_first_settlement_stays(engine: Engine) -> None:
    """The write itself is conditional: a second one changes nothing, even from who forgot to hold the payment."""
    with transaction(engine) as tx:
        record(tx, "p1")
        payments.settle(tx, [settlement("p1", PaymentState.RELEASED)])
        payments.settle(tx, [settlement("p1", PaymentState.FAILED)])
        [due] = payments.overdue(tx, START + payments.REDELIVERY, 10)
    assert (due.state, due.outcome["state"]) == (PaymentState.RELEASED, "released")


def test_a_payment_is_recorded_once(engine: Engine) -> None:
    """A second time nothing is written."""
    job = parse_job({"payment_id": "p1", "account_id": "acct_1"}, currency="USD")
    with transaction(engine) as tx:
        assert payments.record(tx, [job, job], START) == {"p1"}
        assert not payments.record(tx, [job], START + timedelta(seconds=9))
        [waiting] = payments.still_waiting(tx, ["p1"])
    assert waiting.requested_at == START


def test_those_who_wait_come_in_the_order_of_their_requests(engine: Engine) -> None:
    """Not in that of their names: who asked first is covered first."""
    with transaction(engine) as tx:
        for payment_id, seconds in (("a", 2), ("b", 0), ("c", 1)):
            record(tx, payment_id, seconds=seconds)
        assert [waiting.payment_id for waiting in payments.waiting_on(tx, ["acct_1"])["acct_1"]] == ["b", "c", "a"]


def test_an_outcome_is_due_until_it_is_noted_as_delivered(engine: Engine) -> None:
    """And while somebody delivers it, nobody else is given it."""
    with transaction(engine) as tx:
        record(tx, "p1")
        assert payments.overdue(tx, START + timedelta(days=1), 10) == []
        [due] = payments.settle(tx, [settlement("p1", PaymentState.RELEASED)])
        assert (due.task_id, due.outcome["state"]) == ("task_p1", "released")
        assert payments.overdue(tx, START, 10) == []
        late = START + payments.REDELIVERY
        assert [due.task_id for due in payments.overdue(tx, late, 10)] == ["task_p1"]
        assert payments.overdue(tx, late, 10) == []
        assert [due.task_id for due in payments.overdue(tx, late + payments.REDELIVERY, 10)] == ["task_p1"]
        payments.delivered(tx, {"task_p1": late})
        assert payments.overdue(tx, late + timedelta(days=1), 10) == []


def test_what_upkeep_does_not_settle_it_looks_at_again_later(engine: Engine) -> None:
    """Soon after the request, then when it was told to."""
    with transaction(engine) as tx:
        record(tx, "p1")
        assert payments.due(tx, START + timedelta(seconds=4), 10) == []
        assert len(payments.due(tx, START + payments.FIRST_LOOK, 10)) == 1
        payments.look_again(tx, {"p1": START + timedelta(seconds=60)})
        assert payments.due(tx, START + timedelta(seconds=59), 10) == []
        assert len(payments.due(tx, START + timedelta(seconds=60), 10)) == 1


def test_the_tasks_of_a_payment_lead_to_it(engine: Engine) -> None:
    """And a task that nobody knows leads nowhere."""
    with transaction(engine) as tx:
        record(tx, "p1")
        payments.await_outcomes(tx, [("p1", {"id": "task_again"})], due_at=None)
        assert payments.of_tasks(tx, ["task_p1", "task_again", "task_unknown"]) == ["p1"]


def test_all_that_news_concerns_is_held_however_much_it_is(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else gets hold of any of it meanwhile, and so no two transactions wait for each other half-way."""
    if engine.dialect.name == "sqlite":
        return  # it has one writer at a time
    monkeypatch.setattr(payments, "SLICE", 5)
    numbers = range(2 * payments.SLICE + 2)
    news: list[News] = [Relink(f"acct_a{n}", "conn_x", START) for n in numbers]
    news += [Breakdown("", START, connection_id=f"conn_{n}") for n in numbers]
    news += [Breakdown("", START, profile_id=f"p_{n}") for n in numbers]
    with transaction(engine) as tx:
        for n in numbers:
            record(tx, f"a{n}", account_id=f"acct_a{n}")
            record(tx, f"c{n}", connection_id=f"conn_{n}")
            record(tx, f"p{n}", profile_id=f"p_{n}")
        record(tx, "other", connection_id="conn_other", profile_id="p_other")
    with transaction(engine) as tx, transaction(engine) as other:
        payments.hold_concerned(tx, news)
        free = payments.due(other, START + timedelta(days=1), 100)
        assert [waiting.payment_id for waiting in free] == ["other"]


def test_an_outcome_that_somebody_else_was_given_is_not_delivered_beside_it(engine: Engine) -> None:
    """The sweep was quicker than the message that asks for it: whoever comes second leaves it."""
    with transaction(engine) as tx:
        record(tx, "p1")
        record(tx, "p2")
        payments.settle(tx, [settlement(payment_id, PaymentState.RELEASED) for payment_id in ("p1", "p2")])
        late = START + payments.REDELIVERY
        assert [due.task_id for due in payments.overdue(tx, late, 1)] == ["task_p1"]
        assert [due.task_id for due in payments.undelivered(tx, ["task_p1", "task_p2"], late)] == ["task_p2"]
        assert payments.undelivered(tx, ["task_p1", "task_p2"], late) == []
        assert payments.overdue(tx, late, 10) == []
