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
from worker.rules.states import PaymentEvent, PaymentState, RefreshState

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
EVENT_TO = {PaymentState.RELEASED: PaymentEvent.FUNDS_SUFFICIENT, PaymentState.FAILED: PaymentEvent.EXPIRED}
DIME = Price(per_call=Decimal("0.100000"), currency="USD", price_list="2026-11-22")


@dataclass(frozen=True)
class LedgerBuilder:
    """A ledger with helpers that insert rows."""

    url: str
    engine: Engine

    def payment(self, payment_id: str, account_id: str, at: datetime = NOON, **job: Any) -> None:
        """Insert a waiting payment with one task."""
        with transaction(self.engine) as tx:
            new = payments.new_payment(Job(payment_id=payment_id, account_id=account_id, **job), at)
            payments.insert_payments(tx, [new])
            task = NewDelivery(payment_id=payment_id, continuation={"id": f"task-{payment_id}"}, due_at=None)
            outcome_deliveries.register_deliveries(tx, [task])

    def resolve(self, payment_id: str, state: PaymentState, at: datetime, **fields: Any) -> None:
        """Resolve a payment and, unless `delivered` is False, mark its outcome delivered."""
        delivered = fields.pop("delivered", True)
        resolution: dict[str, Any] = {"outcome": {"reason": fields.get("reason"), "detail": "the detail"}, **fields}
        with transaction(self.engine) as tx:
            resolved = Resolution(payment_id=payment_id, event=EVENT_TO[state], resolved_at=at, **resolution)
            payments.resolve(tx, [resolved], at)
            if delivered:
                outcome_deliveries.mark_delivered(tx, {f"task-{payment_id}": at + timedelta(seconds=1)})

    def call(
        self, refresh_id: str, account_id: str, end: EntryState | None, at: datetime = NOON, price: Price = DIME
    ) -> None:
        """Insert a call of a refresh with its final fee entry. With `end` None the entry stays pending."""
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
            call_id = f"call_{refresh_id}_{len(fee_entries.calls_of_refreshes(tx, [refresh_id]).result())}"
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
        self,
        balance_id: str,
        account_id: str,
        at: datetime,
        available: Decimal | None,
        *,
        is_applied: bool = True,
        received_at: datetime | None = None,
        **columns: Any,
    ) -> None:
        """Insert a REFRESH balance. By default it is received at its own time."""
        amounts = {"available": available, "current": None, "limit": None}
        balance = Balance(id=balance_id, accountId=account_id, at=at.isoformat(), source="REFRESH", **amounts)
        with transaction(self.engine) as tx:
            record = balances.new_unapplied_record("evt_1", balance, received_at or at, believe_arrival=False)
            record = replace(record, **columns)
            balances.insert_balances(tx, [replace(record, due_at=None) if is_applied else record])


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path, postgres_server: Postgres) -> Iterator[LedgerBuilder]:
    """Create an empty ledger."""
    url = f"sqlite:///{tmp_path}/ledger.db" if request.param == "sqlite" else postgres_server.database()
    engine = open_engine(url, connections=10, may_create_file=True)
    SQLModel.metadata.create_all(engine)
    yield LedgerBuilder(url, engine)
    engine.dispose()


@pytest.fixture
def history(ledger: LedgerBuilder) -> LedgerBuilder:
    """Insert three payments of a refresh with two calls, a reused balance, a rejected call and a waiting payment."""
    at = [NOON + timedelta(seconds=s) for s in range(20)]
    for number in (1, 2, 3):
        ledger.payment(f"pay_{number}", "acct_a", at[number], amount=Decimal("25.00"), metadata={"order": number})
    ledger.call("ref_a", "acct_a", EntryState.POSTED, at[4])
    ledger.call("ref_a", "acct_a", None, at[5])
    ledger.balance("bal_a", "acct_a", at[6], Decimal("60.00"))
    funds_calculation = {
        "amount": "25.00",
        "multiplier": "1",
        "fixed": "0",
        "needed": "25.00",
        "available": "60.00",
        "limit": None,
        "held": "50.00",
        "held_until": None,
        "held_count": 2,
        "available_after_holds": "10.00",
        "currency": "USD",
    }
    attributed = {"refresh_id": "ref_a", "balance_id": "bal_a"}
    for number in (1, 2):
        outcome = {"payment_id": f"pay_{number}", "state": "released", "verdict": "sufficient"}
        ledger.resolve(f"pay_{number}", PaymentState.RELEASED, at[7], outcome=outcome, **attributed)
    failed = {"reason": "insufficient_funds", "funds_calculation": funds_calculation, "delivered": False}
    ledger.resolve("pay_3", PaymentState.FAILED, at[7], **failed, **attributed)
    ledger.payment("pay_reused", "acct_a", at[8])
    reused = {"outcome": {"verdict": "not_requested"}, **attributed}
    ledger.resolve("pay_reused", PaymentState.RELEASED, at[9], reused=True, **reused)
    ledger.payment("pay_refused", "acct_b", at[10])
    ledger.call("ref_b", "acct_b", EntryState.VOID, at[11])
    ledger.resolve("pay_refused", PaymentState.FAILED, at[12], reason="account_not_found", refresh_id="ref_b")
    ledger.payment("pay_waits", "acct_c", at[13])
    ledger.call("ref_c", "acct_c", EntryState.POSTED, at[14])
    return ledger
