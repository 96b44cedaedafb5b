"""A ledger with a small history, on both databases."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlmodel import SQLModel

from tests.support.servers import Postgres
from worker.ledger import balances, fee_entries, outcome_deliveries, payments, refreshes
from worker.ledger.engine import open_engine, transaction
from worker.ledger.fee_entries import FinalEntry
from worker.ledger.outcome_deliveries import NewDelivery
from worker.ledger.payments import Resolution
from worker.ledger.refreshes import RefreshRecord
from worker.ledger.tables import FEE_ENTRY
from worker.quiltt.messages import Balance
from worker.rules.job import Job
from worker.rules.pricing import EntryState, Price
from worker.rules.states import PaymentState, RefreshState

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
DIME = Price(per_call=Decimal("0.100000"), currency="USD", price_list="2026-11-22")


@dataclass(frozen=True)
class Books:
    """A ledger with helpers that insert rows."""

    url: str
    engine: Engine

    def payment(self, payment_id: str, account_id: str, at: datetime = NOON, **job: Any) -> None:
        """Insert a waiting payment with one task."""
        with transaction(self.engine) as tx:
            payments.insert_payments(tx, [Job(payment_id=payment_id, account_id=account_id, **job)], at)
            task = NewDelivery(payment_id=payment_id, continuation={"id": f"task-{payment_id}"}, due_at=None)
            outcome_deliveries.register_deliveries(tx, [task])

    def settle(self, payment_id: str, state: PaymentState, at: datetime, **how: Any) -> None:
        """Resolve a payment and, unless `delivered` is False, mark its outcome delivered."""
        delivered = how.pop("delivered", True)
        settled: dict[str, Any] = {"outcome": {"reason": how.get("reason"), "detail": "the detail"}, **how}
        with transaction(self.engine) as tx:
            payments.resolve(tx, [Resolution(payment_id=payment_id, state=state, resolved_at=at, **settled)])
            if delivered:
                outcome_deliveries.mark_delivered(tx, {f"task-{payment_id}": at + timedelta(seconds=1)})

    def call(
        self, refresh_id: str, account_id: str, end: EntryState | None, at: datetime = NOON, price: Price = DIME
    ) -> None:
        """Insert a call of a refresh with its final fee entry; `end` None: the entry stays pending."""
        with transaction(self.engine) as tx:
            refresh = RefreshRecord(
                refresh_id=refresh_id,
                account_id=account_id,
                state=RefreshState.CALLING,
                called_at=at,
                claimed_at=at,
                due_at=at,
            )
            refreshes.insert_refreshes(tx, [refresh])
            call_id = f"call_{refresh_id}_{len(fee_entries.calls_of_refreshes(tx, [refresh_id]))}"
            call = fee_entries.new_call(call_id, refresh_id, account_id, price, at)
            fee_entries.open_entries(tx, [call])
            if end is not None:
                final = FinalEntry(call=call, state=end, evidence={"status": 202})
                fee_entries.post_or_void(tx, [final], at + timedelta(seconds=1))

    def entries(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Return call, state and evidence of all fee entries in insertion order."""
        query = select(FEE_ENTRY.c.call_id, FEE_ENTRY.c.state, FEE_ENTRY.c.evidence).order_by(FEE_ENTRY.c.entry_id)
        with transaction(self.engine) as tx:
            return [(row[0], row[1], row[2]) for row in tx.execute(query)]

    def balance(
        self, balance_id: str, account_id: str, at: datetime, available: Decimal | None, *, is_applied: bool = True
    ) -> None:
        """Insert a balance."""
        figures = {"available": available, "current": None, "limit": None}
        balance = Balance(id=balance_id, accountId=account_id, at=at.isoformat(), source="REFRESH", **figures)
        with transaction(self.engine) as tx:
            record = balances.new_unapplied_record("evt_1", balance, at)
            balances.insert_balances(tx, [replace(record, due_at=None) if is_applied else record])


@pytest.fixture(params=["sqlite", "postgresql"])
def books(request: pytest.FixtureRequest, tmp_path: Path, postgres_server: Postgres) -> Iterator[Books]:
    """An empty ledger."""
    url = f"sqlite:///{tmp_path}/ledger.db" if request.param == "sqlite" else postgres_server.database()
    engine = open_engine(url, connections=10)
    SQLModel.metadata.create_all(engine)
    yield Books(url, engine)
    engine.dispose()


@pytest.fixture
def history(books: Books) -> Books:
    """Three payments of a refresh with two calls, one reused balance, one rejected call, one waiting payment."""
    at = [NOON + timedelta(seconds=s) for s in range(20)]
    for number in (1, 2, 3):
        books.payment(f"pay_{number}", "acct_a", at[number], amount=Decimal("25.00"), metadata={"order": number})
    books.call("ref_a", "acct_a", EntryState.POSTED, at[4])
    books.call("ref_a", "acct_a", None, at[5])
    books.balance("bal_a", "acct_a", at[6], Decimal("60.00"))
    funds_calculation = {
        "amount": "25.00",
        "multiplier": "1",
        "fixed": "0",
        "needed": "25.00",
        "available": "60.00",
        "limit": None,
        "released_since_balance": "50.00",
        "released_count": 2,
        "available_after_releases": "10.00",
        "currency": "USD",
    }
    served = {"refresh_id": "ref_a", "balance_id": "bal_a"}
    for number in (1, 2):
        outcome = {"payment_id": f"pay_{number}", "state": "released", "verdict": "sufficient"}
        books.settle(f"pay_{number}", PaymentState.RELEASED, at[7], outcome=outcome, **served)
    failed = {"reason": "insufficient_funds", "funds_calculation": funds_calculation, "delivered": False}
    books.settle("pay_3", PaymentState.FAILED, at[7], **failed, **served)
    books.payment("pay_reused", "acct_a", at[8])
    reused = {"outcome": {"verdict": "not_requested"}, **served}
    books.settle("pay_reused", PaymentState.RELEASED, at[9], reused=True, **reused)
    books.payment("pay_refused", "acct_b", at[10])
    books.call("ref_b", "acct_b", EntryState.VOID, at[11])
    books.settle("pay_refused", PaymentState.FAILED, at[12], reason="account_not_found", refresh_id="ref_b")
    books.payment("pay_waits", "acct_c", at[13])
    books.call("ref_c", "acct_c", EntryState.POSTED, at[14])
    return books
