"""Reconciling an invoice: one transaction, repeatable, and only when its period is over."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from tests.support.databases import Databases
from worker import flow
from worker.ledger import fee_entries, refreshes
from worker.ledger.engine import Engine, open_engine, transaction
from worker.ledger.fee_entries import FinalEntry
from worker.ledger.refreshes import RefreshRecord
from worker.ledger.tables import FEE_ENTRY
from worker.rules.invoice_lines import AggregatedLine, InvoiceError, InvoicePeriod, Level
from worker.rules.invoice_reading import ReadingOptions
from worker.rules.pricing import EntryState, Price
from worker.rules.states import RefreshState

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
DECEMBER = datetime(2026, 12, 1, tzinfo=UTC)
NOVEMBER = InvoicePeriod(since=datetime(2026, 11, 1, tzinfo=UTC), until=DECEMBER, tolerance=timedelta(seconds=300))
LINES = b"account_id,date,amount\nacct_a,2026-11-22T12:00:00Z,0.10\n"


@pytest.fixture
def engine(databases: Databases) -> Iterator[Engine]:
    """A ledger with two pending calls, of acct_a and acct_b, in different modes."""
    with databases.create() as address:
        ledger = open_engine(address, connections=1)
        price = Price(per_call=Decimal("0.10"), currency="USD", price_list="2026-11-22")
        with transaction(ledger) as tx:
            for name, mode in (("a", "PRODUCTION"), ("b", "SANDBOX")):
                refresh = RefreshRecord(
                    refresh_id=f"ref_{name}",
                    account_id=f"acct_{name}",
                    state=RefreshState.CALLING,
                    called_at=NOON,
                    claimed_at=NOON,
                    due_at=NOON,
                )
                refreshes.insert_refreshes(tx, [refresh])
                call = fee_entries.new_call(
                    f"call_{name}", f"ref_{name}", f"acct_{name}", replace(price, mode=mode), NOON
                )
                fee_entries.open_entries(tx, [call])
        yield ledger
        ledger.dispose()


def invoice(data: bytes = LINES, total: Decimal | None = None) -> flow.Invoice:
    """Parse an invoice of November."""
    return flow.parse_invoice_file("i.csv", data, ReadingOptions(), NOVEMBER, currency="USD", total=total)


def monthly_invoice(count: int, *, name: str = "m.csv") -> flow.Invoice:
    """Return an invoice with one line for November."""
    charge = AggregatedLine(
        row=2,
        label="Balance refresh",
        account_id=None,
        since=NOVEMBER.since,
        until=NOVEMBER.until,
        count=count,
        unit_price=Decimal("0.10"),
        amount=count * Decimal("0.10"),
    )
    by_call = invoice()
    content = replace(
        by_call.content, lines=[], aggregated_lines=[charge], level=Level.MONTH, assumptions=("The month is UTC.",)
    )
    return replace(by_call, name=name, digest=f"{name} {count}", content=content)


def final_evidence(engine: Engine) -> list[dict[str, Any]]:
    """Return the evidence of the final entries, in insertion order."""
    with transaction(engine) as tx:
        final = FEE_ENTRY.c.state != "pending"
        return [row.evidence for row in tx.execute(FEE_ENTRY.select().where(final).order_by(FEE_ENTRY.c.entry_id))]


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


def post_by_response(engine: Engine, call_id: str) -> None:
    """Post a call as its response does."""
    with transaction(engine) as tx:
        (call,) = next(fee_entries.calls_in_batches(tx, [call_id]))
        final = FinalEntry(call=call, state=EntryState.POSTED, evidence={"status": 202})
        fee_entries.post_or_void(tx, [final], NOON)


@pytest.mark.parametrize(("count", "state"), [(2, "posted"), (1, "void")])
def test_aggregated_invoice_decides_calls_once_with_line_level_and_assumptions_as_evidence(
    engine: Engine, count: int, state: str
) -> None:
    """A comparison writes nothing. A second application changes nothing."""
    post_by_response(engine, "call_a")
    found = flow.compare_aggregated_invoice(engine, monthly_invoice(count))
    assert len(final_evidence(engine)) == 1
    applied = flow.apply_aggregated_invoice(engine, monthly_invoice(count), DECEMBER + timedelta(days=1))
    assert applied.reconciliation == found
    assert entry_states(engine)[3:] == [("call_b", state)]
    evidence = final_evidence(engine)[-1]
    assert (evidence["name"], evidence["level"], evidence["lines"]) == ("m.csv", "month", [2])
    assert evidence["assumptions"] == ["The month is UTC."]
    assert evidence["read_as"]["delimiter"] == ","
    again = flow.apply_aggregated_invoice(engine, monthly_invoice(count), DECEMBER + timedelta(days=2))
    assert (again.application.posted, again.application.voided) == (0, 0)
    assert len(entry_states(engine)) == 4


def test_recorded_mode_explains_calls_that_the_invoice_omits(engine: Engine) -> None:
    post_by_response(engine, "call_a")
    post_by_response(engine, "call_b")
    (group,) = flow.compare_aggregated_invoice(engine, monthly_invoice(1)).groups
    (cause,) = group.causes
    assert cause.text == "1 call of the mode PRODUCTION or SANDBOX, which the invoice omits"


def test_undecided_aggregated_invoice_leaves_calls_pending(engine: Engine) -> None:
    applied = flow.apply_aggregated_invoice(engine, monthly_invoice(1), DECEMBER + timedelta(days=1))
    assert len(applied.reconciliation.undecided_calls) == 2
    assert len(entry_states(engine)) == 2


def test_invoices_of_both_kinds_for_a_month_cannot_contradict(engine: Engine) -> None:
    """The invoice by call charges call_a and not call_b. A count of two contradicts it, a count of one agrees."""
    later = DECEMBER + timedelta(days=1)
    flow.apply_invoice(engine, invoice(), later)
    with pytest.raises(InvoiceError, match=r"line 2: 2 calls contradict the applied invoice 'i\.csv'"):
        flow.apply_aggregated_invoice(engine, monthly_invoice(2), later)
    assert not flow.apply_aggregated_invoice(engine, monthly_invoice(1), later).reconciliation.has_differences


def test_invoice_by_call_is_rejected_if_it_contradicts_an_applied_count(engine: Engine) -> None:
    """The count charges only the call with a response; the invoice by call charges the other one."""
    later = DECEMBER + timedelta(days=1)
    post_by_response(engine, "call_b")
    flow.apply_aggregated_invoice(engine, monthly_invoice(1), later)
    with pytest.raises(
        InvoiceError, match=r"line 2: it charges call call_a, which the applied invoice 'm\.csv' does not"
    ):
        flow.apply_invoice(engine, invoice(), later)


def test_invoice_by_call_is_rejected_if_it_omits_a_call_of_an_applied_count(engine: Engine) -> None:
    later = DECEMBER + timedelta(days=1)
    flow.apply_aggregated_invoice(engine, monthly_invoice(2), later)
    with pytest.raises(InvoiceError, match=r"not charge call call_b of acct_b, which the applied invoice 'm\.csv'"):
        flow.apply_invoice(engine, invoice(total=Decimal("0.10")), later)


def test_kind_of_invoice_and_command_must_agree(engine: Engine) -> None:
    with pytest.raises(InvoiceError, match="one line per month, not per call"):
        flow.compare_invoice(engine, monthly_invoice(1))
    with pytest.raises(InvoiceError, match="one line per call"):
        flow.compare_aggregated_invoice(engine, invoice())
