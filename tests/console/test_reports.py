"""What people ask of the ledger, answered alike on both databases."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from sqlalchemy.exc import DBAPIError

from tests.console.conftest import DIME, NOON, Books
from worker.fees import EntryState, Price
from worker.ledger import reports
from worker.ledger.database import open_engine, reading, transaction
from worker.ledger.reports import Backlog, Charge
from worker.ledger.tables import PAYMENT


def test_the_shares_of_a_refresh_add_up_to_all_its_calls_but_void_ones(history: Books) -> None:
    """Two calls of 0.10, three payments: the first two settled owe a unit more, and a pending call makes it pending."""
    with reading(history.engine) as tx:
        fees = reports.shares(tx, ["ref_a", "ref_b"])
    assert {key: fee.amount for key, fee in fees.items()} == {
        "pay_1": Decimal("0.066667"),
        "pay_2": Decimal("0.066667"),
        "pay_3": Decimal("0.066666"),
        "pay_refused": Decimal(0),
    }
    assert sum(fee.amount for fee in fees.values()) == Decimal("0.200000")
    assert {fee.state for key, fee in fees.items() if key != "pay_refused"} == {EntryState.PENDING}
    assert fees["pay_refused"].state == EntryState.VOID
    assert fees["pay_1"].shared_by == 3


def test_payments_are_listed_the_last_requested_first(history: Books) -> None:
    """With the verdict of those that were released, and the reason of those that were not."""
    with reading(history.engine) as tx:
        lines = reports.payments(tx)
        waiting = reports.payments(tx, state="waiting")
        two = reports.payments(tx, limit=2)
    assert [(line.payment_id, line.word) for line in lines] == [
        ("pay_waits", None),
        ("pay_refused", "account_not_found"),
        ("pay_reused", "not_asked"),
        ("pay_3", "insufficient_funds"),
        ("pay_2", "sufficient"),
        ("pay_1", "sufficient"),
    ]
    assert [line.payment_id for line in waiting] == ["pay_waits"]
    assert two == lines[:2]
    assert lines[2].fee is None
    assert lines[2].reused


def test_a_timeline_tells_a_payments_whole_way(history: Books) -> None:
    """Job, calls with their fees, balance, verdict, deliveries."""
    with reading(history.engine) as tx:
        found = reports.timeline(tx, "pay_3")
    assert found is not None
    assert found.job["metadata"] == {"order": 3}
    assert [(call.state, call.closed_at) for call in found.calls] == [
        (EntryState.POSTED, NOON + timedelta(seconds=5)),
        (EntryState.PENDING, None),
    ]
    assert found.balance is not None
    assert found.balance.available == Decimal("60.00")
    assert found.arithmetic is not None
    assert found.arithmetic["there"] == "10.00"
    assert [(reply.task_id, reply.delivered_at) for reply in found.replies] == [("task-pay_3", None)]


def test_a_timeline_of_a_waiting_payment_shows_the_call_that_is_to_serve_it(history: Books) -> None:
    """Though nothing ties the two together before the end; and nobody's timeline is None."""
    with reading(history.engine) as tx:
        found = reports.timeline(tx, "pay_waits")
        assert reports.timeline(tx, "pay_nobody") is None
    assert found is not None
    assert found.refresh is not None
    assert found.refresh.refresh_id == "ref_c"
    assert [call.state for call in found.calls] == [EntryState.POSTED]


def test_a_statement_counts_the_calls_of_its_month_as_they_stand_now(history: Books) -> None:
    """A call belongs to the month in which it was made; the end of the month is the next one's."""
    december = datetime(2026, 12, 1, tzinfo=UTC)
    history.call("ref_late", "acct_d", EntryState.POSTED, december - timedelta(microseconds=1))
    history.call("ref_next", "acct_e", EntryState.POSTED, december)
    with reading(history.engine) as tx:
        november = reports.statement(tx, datetime(2026, 11, 1, tzinfo=UTC), december)
        after = reports.statement(tx, december, datetime(2027, 1, 1, tzinfo=UTC))
    assert [(charge.state, charge.calls, charge.amount) for charge in november] == [
        (EntryState.POSTED, 3, Decimal("0.300000")),
        (EntryState.PENDING, 1, Decimal("0.100000")),
        (EntryState.VOID, 1, Decimal(0)),
    ]
    assert after == [Charge(EntryState.POSTED, DIME.per_call, "USD", "2026-11-22", 1)]


def test_sums_are_exact_where_floats_are_not(books: Books) -> None:
    """Three calls of 0.1 are 0.3; each price, currency and price list is a line of its own."""
    for number in range(3):
        books.call(f"ref_{number}", f"acct_{number}", EntryState.POSTED)
    books.call("ref_dear", "acct_x", EntryState.POSTED, price=Price(Decimal("0.333333"), "USD", "2027-01-01"))
    books.call("ref_euro", "acct_y", EntryState.POSTED, price=Price(Decimal("0.100000"), "EUR", "2026-11-22"))
    with reading(books.engine) as tx:
        charges = reports.statement(tx, NOON, NOON + timedelta(days=1))
    assert [(charge.currency, charge.calls, charge.amount) for charge in charges] == [
        ("EUR", 1, Decimal("0.100000")),
        ("USD", 3, Decimal("0.300000")),
        ("USD", 1, Decimal("0.333333")),
    ]


def test_what_is_not_finished_is_counted(history: Books) -> None:
    """One waits, one was not told its outcome."""
    with reading(history.engine) as tx:
        assert reports.backlog(tx) == Backlog(waiting=1, undelivered=1, unapplied=0)
        calls = reports.calls_by_account(tx, ["acct_a", "acct_c", "acct_nobody"])
    assert calls == {"acct_a": {EntryState.POSTED: 1, EntryState.PENDING: 1}, "acct_c": {EntryState.POSTED: 1}}


def test_an_empty_ledger_answers_too(books: Books) -> None:
    """With nothing."""
    with reading(books.engine) as tx:
        assert reports.payments(tx) == []
        assert reports.payments(tx, payment_ids=[]) == []
        assert reports.statement(tx, NOON, NOON + timedelta(days=1)) == []
        assert reports.backlog(tx) == Backlog(0, 0, 0)


def test_who_reads_holds_up_nobody_who_writes(books: Books) -> None:
    """And goes on seeing the ledger as it was."""
    books.payment("pay_1", "acct_a")
    with reading(books.engine) as tx:
        before = reports.payments(tx)
        books.payment("pay_2", "acct_a")
        assert reports.payments(tx) == before
    with reading(books.engine) as tx:
        assert len(reports.payments(tx)) == 2


def test_nothing_is_written_by_who_reads(books: Books) -> None:
    """PostgreSQL refuses it; on both it is gone in the end, and the connection writes again for the next."""
    books.payment("pay_1", "acct_a")
    one = open_engine(books.url, connections=1)
    with reading(one) as tx:
        if tx.dialect.name == "postgresql":
            with pytest.raises(DBAPIError, match="read-only"):
                tx.execute(PAYMENT.update().values(reason="y"))
        else:
            tx.execute(PAYMENT.update().values(reason="y"))
    with transaction(one) as tx:
        assert tx.execute(PAYMENT.select()).one().reason is None
        assert tx.execute(PAYMENT.update().values(reason="x")).rowcount == 1
    one.dispose()
