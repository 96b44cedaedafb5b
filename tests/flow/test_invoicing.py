"""Reconciling an invoice: one transaction, repeatable, and only when its period is over."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from tests.support.databases import Databases
from worker import flow
from worker.ledger import fee_entries, refreshes
from worker.ledger.engine import Engine, open_engine, transaction
from worker.ledger.refreshes import RefreshRecord
from worker.ledger.tables import FEE_ENTRY
from worker.rules.invoice_file import InvoiceColumns, InvoiceError, InvoicePeriod
from worker.rules.pricing import Price
from worker.rules.states import RefreshState

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
DECEMBER = datetime(2026, 12, 1, tzinfo=UTC)
NOVEMBER = InvoicePeriod(since=datetime(2026, 11, 1, tzinfo=UTC), until=DECEMBER, tolerance=timedelta(seconds=300))
LINES = b"account_id,date,amount\nacct_a,2026-11-22T12:00:00Z,0.10\n"


@pytest.fixture
def engine(databases: Databases) -> Iterator[Engine]:
    """A ledger with two pending calls, of acct_a and acct_b."""
    with databases.create() as address:
        ledger = open_engine(address, connections=1)
        price = Price(per_call=Decimal("0.10"), currency="USD", price_list="2026-11-22")
        with transaction(ledger) as tx:
            for name in ("a", "b"):
                refresh = RefreshRecord(
                    refresh_id=f"ref_{name}",
                    account_id=f"acct_{name}",
                    state=RefreshState.CALLING,
                    called_at=NOON,
                    claimed_at=NOON,
                    due_at=NOON,
                )
                refreshes.insert_refreshes(tx, [refresh])
                call = fee_entries.new_call(f"call_{name}", f"ref_{name}", f"acct_{name}", price, NOON)
                fee_entries.open_entries(tx, [call])
        yield ledger
        ledger.dispose()


def invoice(data: bytes = LINES, total: Decimal | None = None) -> flow.Invoice:
    """Parse an invoice of November."""
    return flow.parse_invoice_file("i.csv", data, InvoiceColumns(), NOVEMBER, currency="USD", total=total)


def entry_states(engine: Engine) -> list[tuple[str, str]]:
    """Return call and state of all fee entries, in insertion order."""
    with transaction(engine) as tx:
        rows = tx.execute(FEE_ENTRY.select().order_by(FEE_ENTRY.c.entry_id))
        return [(row.call_id, row.state) for row in rows]


def test_applied_invoice_changes_nothing_again(engine: Engine) -> None:
    """A comparison writes nothing, and finds the same."""
    pending = [("call_a", "pending"), ("call_b", "pending")]
    found = flow.compare_invoice(engine, invoice())
    assert entry_states(engine) == pending
    applied = flow.apply_invoice(engine, invoice(), DECEMBER + timedelta(days=1))
    assert applied.reconciliation == found
    assert (applied.application.posted, applied.application.voided) == (1, 1)
    assert entry_states(engine) == [*pending, ("call_a", "posted"), ("call_b", "void")]
    again = flow.apply_invoice(engine, invoice(), DECEMBER + timedelta(days=2))
    assert (again.application.posted, again.application.voided) == (0, 0)
    assert len(entry_states(engine)) == 4


def test_invoice_is_rejected_until_its_period_and_tolerance_are_over(engine: Engine) -> None:
    """Clocks differ by up to the tolerance, so calls of the period may still arrive."""
    with pytest.raises(InvoiceError, match="2026-11 is not over"):
        flow.apply_invoice(engine, invoice(), DECEMBER + timedelta(seconds=299))
    assert len(entry_states(engine)) == 2


def test_implausible_invoice_is_rejected_as_a_whole(engine: Engine) -> None:
    """No line matches a call, or the lines do not add up to the total."""
    with pytest.raises(InvoiceError, match="none of the 1 lines matches"):
        flow.apply_invoice(engine, invoice(LINES.replace(b"acct_a", b"acct_x")), DECEMBER + timedelta(days=1))
    assert len(entry_states(engine)) == 2
    with pytest.raises(InvoiceError, match="add up to"):
        invoice(total=Decimal("0.20"))
