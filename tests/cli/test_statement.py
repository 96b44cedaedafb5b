"""`payready fees statement`: its head, ranges of months, comparison, and CSV for spreadsheets, on both databases."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli.main import app
from config.settings import settings
from tests.cli.conftest import DIME, NOON, LedgerBuilder
from worker.reports.csv_output import safe_text, write_csv
from worker.reports.statement_report import head_lines
from worker.rules.pricing import EntryState, Price
from worker.rules.statement_period import parse_period
from worker.rules.states import PaymentState

Run = Callable[..., Any]
TEST, PRODUCTION = replace(DIME, mode="TEST"), replace(DIME, mode="PRODUCTION")
OCTOBER = NOON - timedelta(days=30)


@pytest.fixture
def run(ledger: LedgerBuilder, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command in December."""
    monkeypatch.setenv("PAYREADY_DATABASE_URL", ledger.url)
    monkeypatch.setattr("cli.command_line.settings", settings.__wrapped__)
    monkeypatch.setattr("cli.statement_commands.utc_now", lambda: datetime(2026, 12, 3, tzinfo=UTC))
    return lambda *arguments: CliRunner().invoke(app, ["fees", "statement", *arguments])


def _call(ledger: LedgerBuilder, name: str, end: EntryState | None, at: datetime = NOON, price: Price = DIME) -> None:
    ledger.call(f"ref_{name}", f"acct_{name}", end, at, price)


def _pay(ledger: LedgerBuilder, payment_id: str, name: str, at: datetime) -> None:
    ledger.payment(payment_id, f"acct_{name}", at)
    ledger.resolve(payment_id, PaymentState.RELEASED, at, refresh_id=f"ref_{name}")


@pytest.mark.parametrize("by", [(), ("--by", "day"), ("--by", "payment")])
def test_statement_of_a_test_key_says_that_it_is_no_bill(ledger: LedgerBuilder, run: Run, by: tuple[str, ...]) -> None:
    """The head has the period, the time zone and the mode."""
    _call(ledger, "1", EntryState.POSTED, NOON, TEST)
    output = run("--month", "2026-11", *by).output
    assert output.splitlines()[:3] == [
        "Calls of 2026-11: 2026-11-01 to 2026-11-30 (UTC)",
        "Mode of the API key: TEST (1 call)",
        "This is no bill: Quiltt bills calls of mode PRODUCTION only.",
    ]
    report = json.loads(run("--month", "2026-11", "--json", *by).output)
    assert (report["since"], report["until"]) == ("2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z")
    assert (report["time_zone"], report["is_over"], report["calls_by_mode"]) == ("UTC", True, {"TEST": 1})
    (row,) = csv.DictReader(io.StringIO(run("--month", "2026-11", "--csv", *by).output))
    assert (row["period"], row["time zone"], row["mode"], row["currency"]) == ("2026-11", "UTC", "TEST", "USD")


def test_statement_names_each_mode(ledger: LedgerBuilder, run: Run) -> None:
    """A bill is only what was called in production. The mode of old calls is unknown."""
    _call(ledger, "1", EntryState.POSTED, NOON, PRODUCTION)
    assert "bill" not in run("--month", "2026-11").output
    _call(ledger, "2", EntryState.POSTED, NOON, TEST)
    output = run("--month", "2026-11").output
    assert "Mode of the API key: PRODUCTION (1 call), TEST (1 call)\nNot all of it is a bill" in output
    _call(ledger, "3", EntryState.POSTED, OCTOBER)
    assert "Mode of the API key: unknown (1 call)\nprice list" in run("--month", "2026-10").output
    assert "The period is not over" in run("--month", "2026-12").output
    assert "The period is not over" not in output


def test_statement_says_what_pending_calls_may_still_cost(ledger: LedgerBuilder, run: Run) -> None:
    _call(ledger, "1", EntryState.POSTED)
    assert "final amount" not in run("--month", "2026-11").output
    _call(ledger, "2", None)
    _call(ledger, "3", None)
    output = run("--month", "2026-11").output
    assert "final amount: 0.10 to 0.30 USD; 2 pending calls are not decided yet" in output
    report = json.loads(run("--month", "2026-11", "--json").output)
    assert report["final_amount"] == {"USD": {"lowest": "0.100000", "highest": "0.300000"}}


@pytest.mark.parametrize("by", ["price", "account", "day", "payment"])
def test_statement_of_several_months_is_their_sum(ledger: LedgerBuilder, run: Run, by: str) -> None:
    """A refresh with calls in two months is shared exactly."""
    for at in (OCTOBER, NOON):
        _call(ledger, "1", EntryState.POSTED, at, TEST)
        _call(ledger, f"{at:%m}", None, at, TEST)
    for number in range(3):
        _pay(ledger, f"p{number}", "1", NOON + timedelta(seconds=number))
    group = [] if by == "price" else ["--by", by]
    both = json.loads(run("--month", "2026-10..2026-11", "--json", *group).output)
    months = [json.loads(run("--month", month, "--json", *group).output) for month in ("2026-10", "2026-11")]
    assert (both["month"], both["until"], both["calls_by_mode"]) == (
        "2026-10..2026-11",
        "2026-12-01T00:00:00Z",
        {"TEST": 4},
    )
    amount = "fee" if by == "payment" else "posted_amount"

    def total(report: dict[str, Any]) -> Decimal:
        return sum((Decimal(line[amount]) for line in report["lines"]), Decimal(0))

    assert total(both) == total(months[0]) + total(months[1]) > 0
    if by == "payment":
        assert [line["fee"] for line in both["lines"]][:3] == ["0.066667", "0.066667", "0.066666"]
        return
    counts = {"price": [4], "account": [2, 1, 1], "day": [2, 2]}[by]
    assert [line["calls"] for line in both["lines"]] == counts
    saved = [report["totals"]["USD"]["saved"] for report in (both, *months)]
    assert [(each["shared"], each["by_sharing"]) for each in saved] == [
        (2, "0.400000"),
        (2, "0.200000"),
        (0, "0.200000"),
    ]


def test_comparison_has_totals_of_the_month_before(ledger: LedgerBuilder, run: Run) -> None:
    """For several months, of as many months before. Percentages need a month before."""
    for number, at in enumerate((OCTOBER, NOON, NOON)):
        _call(ledger, f"{number}", EntryState.POSTED, at)
    output = run("--month", "2026-11", "--compare").output
    rows = [line.split() for line in output.split("Compared with 2026-10\n")[1].splitlines()]
    assert rows[:2] == [
        ["2026-10", "2026-11", "change", "currency"],
        ["posted", "amount", "0.10", "0.20", "+0.10", "+100.0", "%", "USD"],
    ]
    assert rows[-1] == ["calls", "1", "2", "+1", "+100.0", "%", "USD"]
    output = run("--month", "2026-10..2026-11", "--compare").output
    assert output.splitlines()[-1].split() == ["calls", "0", "3", "+3", "USD"]
    report = json.loads(run("--month", "2026-12", "--compare", "--json").output)
    assert (report["compared_with"]["month"], report["totals"]) == ("2026-11", {})
    assert report["compared_with"]["totals"]["USD"]["posted_amount"] == "0.200000"
    assert run("--compare", "--csv").exit_code == run("--compare", "--by", "payment").exit_code == 2


@pytest.mark.parametrize(
    "month", ["2026-11..2026-10", "2026-11..", "..2026-11", "2026-11...2026-12", "2000-01..2026-01"]
)
def test_wrong_range_of_months_is_rejected(run: Run, month: str) -> None:
    result = run("--month", month)
    assert (result.exit_code, "2026-10..2026-12" in result.stderr) == (2, True)


def test_period_has_as_many_months_before_it() -> None:
    period = parse_period("2026-01..2026-03")
    assert period is not None
    assert (period.previous.name, period.previous.previous.name) == ("2025-10..2025-12", "2025-07..2025-09")
    month = parse_period("2026-03")
    assert month is not None
    assert (month.name, month.previous.name) == ("2026-03", "2026-02")


def test_csv_has_no_formula_from_outside(ledger: LedgerBuilder, run: Run) -> None:
    """An apostrophe makes it text. A control character reaches no terminal. Amounts stay numbers."""
    version = '=HYPERLINK("http://x";"\x1b[31mbill")'
    _call(ledger, "1", EntryState.POSTED, NOON, replace(DIME, price_list=version))
    _pay(ledger, '=HYPERLINK("http://x")', "1", NOON)
    by_price, by_payment = run("--month", "2026-11", "--csv"), run("--month", "2026-11", "--csv", "--by", "payment")
    assert "\x1b" not in by_price.output
    (row,) = csv.DictReader(io.StringIO(by_price.output))
    assert (row["price list"], row["posted amount"]) == (r"""'=HYPERLINK("http://x";"\x1b[31mbill")""", "0.100000")
    (row,) = csv.DictReader(io.StringIO(by_payment.output))
    assert (row["payment"], row["fee"]) == ("""'=HYPERLINK("http://x")""", "0.100000")


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        (" =1", "' =1"),
        ("\t=1", r"\t=1"),
        ("\r=1", r"\r=1"),
        ("a;=1", "a;'=1"),
        ('a",=1', "a\",'=1"),
        ("\uff1d1", "'\uff1d1"),
        ("acct-1=b", "acct-1=b"),
        ("Überweisung; Nr. 1", "Überweisung; Nr. 1"),
        ("", ""),
    ],
)
def test_text_that_is_a_formula_is_marked(text: str, written: str) -> None:
    assert safe_text(text) == written


@given(text=st.text(), separator=st.sampled_from(",;|\t"))
def test_no_cell_begins_as_a_formula_however_the_file_is_split(text: str, separator: str) -> None:
    """A spreadsheet may separate cells by another character than the comma. The number stays a number."""
    output = io.StringIO()
    write_csv(output, ["number", "text"], [[Decimal("-0.100000"), text]])
    (row,) = list(csv.reader(io.StringIO(output.getvalue())))[1:]
    assert row[0] == "-0.100000"
    for line in output.getvalue().splitlines()[1:]:
        cells = line.removeprefix("-0.100000,").split(separator)
        assert not any(cell.lstrip(' "').startswith(("=", "+", "-", "@")) for cell in cells)


def test_statement_with_calls_of_unknown_mode_does_not_say_that_they_are_no_bill() -> None:
    period = parse_period("2026-11")
    assert period is not None
    lines = head_lines(period, {"PRODUCTION": 1, "unknown": 2}, is_over=True)
    assert lines[1:] == ["Mode of the API key: PRODUCTION (1 call), unknown (2 calls)"]
    assert "Not all of it" in head_lines(period, {"TEST": 1, "unknown": 2}, is_over=True)[-1]
