"""Invoices of any dialect, and files broken in any way, against a ledger: the same result, or no change at all."""

import csv
import io
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openpyxl import Workbook
from sqlmodel import SQLModel

from demo.processes import ROOT
from tests.cli.conftest import LedgerBuilder
from tests.support.invoice_files import NOVEMBER
from worker import flow
from worker.ledger.engine import open_engine
from worker.rules.invoice_format import DateStyle, DecimalStyle
from worker.rules.invoice_lines import InvoiceError, Level
from worker.rules.invoice_reading import ReadingOptions
from worker.rules.pricing import EntryState
from worker.rules.reconciliation import Reconciliation

pytestmark = pytest.mark.slow

JANUARY = datetime(2027, 1, 2, tzinfo=UTC)
CALLS: Sequence[tuple[str, int, EntryState | None]] = (
    ("acct_a", 3, EntryState.POSTED),
    ("acct_a", 12, None),
    ("acct_b", 13, EntryState.POSTED),
    ("acct_b", 20, None),
    ("acct_d", 14, EntryState.VOID),
    ("acct_c", 25, EntryState.POSTED),
)
"""Account, day of November, and final state of the ledger's calls of 0.10 USD."""
CHARGES = [("acct_a", 3), ("acct_a", 12), ("acct_b", 13), ("acct_c", 25)]
"""Account and day of the invoice's charges. The last one is of a posted call."""
TRUTH = "Account,Date,Amount\n" + "".join(f"{account},2026-11-{day:02},0.10\n" for account, day in CHARGES)
SAMPLES = sorted(path.read_bytes() for path in (ROOT / "tests" / "invoices").iterdir() if path.suffix != ".toml")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the calls."""
    file = tmp_path_factory.mktemp("ledger") / "template.db"
    engine = open_engine(f"sqlite:///{file}", connections=1, may_create_file=True)
    SQLModel.metadata.create_all(engine)
    ledger = LedgerBuilder("", engine)
    for account, day, state in CALLS:
        ledger.call(account.replace("acct", "ref"), account, state, datetime(2026, 11, day, 12, tzinfo=UTC))
    engine.dispose()
    return file


@contextmanager
def copy_of(template: Path) -> Iterator[LedgerBuilder]:
    """Provide a ledger with the calls."""
    file = template.with_name("copy.db")
    for rest in file.parent.glob(f"{file.name}-*"):
        rest.unlink()
    shutil.copy(template, file)
    engine = open_engine(f"sqlite:///{file}", connections=1)
    yield LedgerBuilder("", engine)
    engine.dispose()


def parsed(data: bytes, **options: Any) -> flow.Invoice:
    return flow.parse_invoice_file("i", data, ReadingOptions(**options), NOVEMBER, currency="USD", total=None)


def finding(result: Reconciliation) -> dict[str, Any]:
    """Return a reconciliation without the numbers of lines, which differ by file."""
    return {
        "matched": [(match.line.account_id, match.line.amount, match.call) for match in result.matched],
        "lines": [(line.account_id, line.since.date(), line.amount) for line in result.unmatched_lines],
        "calls": result.unmatched_calls,
        "void": result.to_void,
        "differs": result.has_differences,
    }


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a file is written, and the options without which it may be ambiguous."""

    date_style: DateStyle
    date_format: str
    decimal_style: DecimalStyle
    amount_format: str
    delimiter: str
    encoding: str
    line_end: str
    quoting: int
    columns: Sequence[str]
    has_preamble: bool
    has_total: bool
    has_credit: bool

    def amount(self, amount: Decimal) -> str:
        """Return an amount as text."""
        text = f"{amount:,.2f}"
        if self.decimal_style is DecimalStyle.COMMA:
            text = text.translate(str.maketrans(",.", ".,"))
        return self.amount_format.format(text)

    def rows(self, truth: Sequence[tuple[str, int, Decimal]]) -> list[list[str]]:
        """Return the rows of a file."""
        total = sum((amount for _, _, amount in truth), Decimal(0))
        records = [
            {
                "Account": account,
                "Usage date": f"{date(2026, 11, day):{self.date_format}}",
                "Amount": self.amount(amount),
                "Description": "Balance refresh, live",
            }
            for account, day, amount in truth
        ]
        if self.has_credit:
            records.append({"Description": "Discount", "Amount": f"-{self.amount(Decimal(1))}"})
            total -= 1
        if self.has_total:
            records.append({"Account": "Total", "Amount": self.amount(total).replace("-", "") if total >= 0 else ""})
        preamble = [["Invoice 2026-311"], [], ["Billed to", "Example Inc."]] if self.has_preamble else []
        rows = [[record.get(name, "") for name in self.columns] for record in records]
        return [*preamble, list(self.columns), *rows]

    def csv(self, truth: Sequence[tuple[str, int, Decimal]]) -> bytes:
        """Return a CSV file."""
        file = io.StringIO()
        writer = csv.writer(file, delimiter=self.delimiter, lineterminator=self.line_end, quoting=self.quoting)  # type: ignore[arg-type]
        writer.writerows(self.rows(truth))
        return file.getvalue().encode(self.encoding)

    def xlsx(self, truth: Sequence[tuple[str, int, Decimal]]) -> bytes:
        """Return a spreadsheet file of texts."""
        book, file = Workbook(), io.BytesIO()
        for row in self.rows(truth):
            book.worksheets[0].append(row)
        book.save(file)
        return file.getvalue()


DATES = [
    (DateStyle.ISO, "%Y-%m-%d"),
    (DateStyle.ISO, "%Y-%m-%d 00:00:00"),
    (DateStyle.YEAR_SLASH, "%Y/%m/%d"),
    (DateStyle.MONTH_FIRST, "%m/%d/%Y"),
    (DateStyle.MONTH_FIRST, "%m/%d/%y"),
    (DateStyle.DAY_FIRST_SLASH, "%d/%m/%Y"),
    (DateStyle.DAY_FIRST_DOT, "%d.%m.%Y"),
    (DateStyle.DAY_FIRST_DASH, "%d-%m-%Y"),
    (DateStyle.MONTH_FIRST_DASH, "%m-%d-%Y"),
    (DateStyle.COMPACT, "%Y%m%d"),
    (DateStyle.MONTH_NAME, "%b %d, %Y"),
    (DateStyle.MONTH_NAME_DAY_FIRST, "%d %B %Y"),
]
dialects = st.builds(
    lambda dates, **rest: Dialect(date_style=dates[0], date_format=dates[1], **rest),
    dates=st.sampled_from(DATES),
    decimal_style=st.sampled_from(DecimalStyle),
    amount_format=st.sampled_from(["{}", "${}", "{} USD", "USD {}", " {} "]),
    delimiter=st.sampled_from(",;\t|"),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"]),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    columns=st.permutations(["Account", "Usage date", "Amount", "Description"]),
    has_preamble=st.booleans(),
    has_total=st.booleans(),
    has_credit=st.booleans(),
)
charges = st.lists(
    st.tuples(
        st.sampled_from(["acct_a", "acct_b", "acct_c", "acct_d", "acct_x"]),
        st.sampled_from([3, 12, 13, 14, 20, 25, 28]),
        st.sampled_from([Decimal("0.10"), Decimal("0.12"), Decimal("1234.50")]),
    ),
    min_size=1,
    max_size=8,
)


@given(charges, dialects)
def test_one_truth_in_any_dialect_has_the_same_reconciliation(
    template: Path, truth: list[tuple[str, int, Decimal]], dialect: Dialect
) -> None:
    """The options of the styles are given, because few lines may be ambiguous. The rest is proposed."""
    plain = "Account,Date,Amount\n" + "".join(f"{name},2026-11-{day:02},{amount}\n" for name, day, amount in truth)
    styles = {"date_style": dialect.date_style, "decimal_style": dialect.decimal_style}
    with copy_of(template) as ledger:
        expected = finding(flow.compare_invoice(ledger.engine, parsed(plain.encode())))
        before = ledger.entries()
        for data in (dialect.csv(truth), dialect.xlsx(truth)):
            assert finding(flow.compare_invoice(ledger.engine, parsed(data, **styles))) == expected
        assert ledger.entries() == before


def try_to_apply(ledger: LedgerBuilder, data: bytes) -> str:
    """Compare and apply a file in January. Return the error, if it is rejected."""
    before = ledger.entries()
    try:
        invoice = parsed(data)
    except InvoiceError as error:
        return str(error)
    is_by_call = invoice.content.level is None
    try:
        if is_by_call:
            flow.compare_invoice(ledger.engine, invoice)
        else:
            flow.compare_aggregated_invoice(ledger.engine, invoice)
    except InvoiceError as error:
        return str(error)
    finally:
        assert ledger.entries() == before, "a comparison writes nothing"
    try:
        if is_by_call:
            flow.apply_invoice(ledger.engine, invoice, JANUARY)
        else:
            flow.apply_aggregated_invoice(ledger.engine, invoice, JANUARY)
    except InvoiceError as error:
        assert ledger.entries() == before, "a rejected file writes nothing"
        return str(error)
    return ""


breaks = st.tuples(st.integers(0, 5000), st.integers(0, 20), st.binary(max_size=12))
"""At a position of a file, how many bytes are replaced by which bytes."""


@given(st.one_of(st.sampled_from(SAMPLES), st.binary(max_size=300)), st.lists(breaks, max_size=3))
def test_broken_file_is_rejected_or_applied_as_a_whole(
    template: Path, data: bytes, damages: list[tuple[int, int, bytes]]
) -> None:
    """It never changes a final entry, and never charges a call twice. A rejected file changes nothing."""
    for at, length, junk in damages:
        position = at % (len(data) + 1)
        data = data[:position] + junk + data[position + length :]
    with copy_of(template) as ledger:
        before = ledger.entries()
        try_to_apply(ledger, data)
        entries = ledger.entries()
        assert entries[: len(before)] == before
        final = [call for call, state, _ in entries if state != "pending"]
        assert len(final) == len(set(final))
        again = try_to_apply(ledger, data)
        assert ledger.entries() == entries, again


@settings(max_examples=len(TRUTH) * 2)
@given(st.integers(0, len(TRUTH) + 12), st.sampled_from(["utf-8", "utf-16"]), st.booleans())
def test_cut_off_file_decides_no_call_otherwise_than_the_whole(
    template: Path,
    length: int,
    encoding: str,
    has_total: bool,  # noqa: FBT001 - hypothesis gives arguments by position
) -> None:
    """Its last charge is of a posted call, so a file without its last lines omits it."""
    whole = (TRUTH + ("Total,,0.40\n" if has_total else "")).encode(encoding)
    with copy_of(template) as ledger:
        try_to_apply(ledger, whole[: length * (2 if encoding == "utf-16" else 1)])
        states = {call: state for call, state, _ in ledger.entries()}
    assert states["call_ref_a_1"] in ("pending", "posted")
    assert states["call_ref_b_1"] in ("pending", "void")


def test_by_day_truth_has_the_level_day(template: Path) -> None:
    """A guard of the test itself: samples of both kinds reach the ledger."""
    levels = set()
    with copy_of(template) as ledger:
        for data in SAMPLES:
            if not try_to_apply(ledger, data):
                levels.add(parsed(data).content.level)
    assert levels >= {None, Level.MONTH, Level.DAY, Level.ACCOUNT}
