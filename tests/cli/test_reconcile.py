"""`payready fees reconcile`: reading options, profiles, reports, exit statuses, and values from outside."""

import csv
import io
import json
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from cli.reconcile_commands import EXIT_DIFFERENCES
from cli.reconciliation_output import limited_report_tables
from config.escaping import escape_unprintable
from config.settings import settings
from demo.processes import ROOT
from tests.cli.conftest import NOON, LedgerBuilder
from tests.cli.test_fee_tables import LONG, printed
from worker import flow
from worker.reports.csv_output import safe_text
from worker.reports.reconciliation_files import report_html
from worker.reports.reconciliation_report import CSV_COLUMNS, by_call_report
from worker.rules.call_matching import LedgerCall, LineMatch
from worker.rules.invoice_format import InvoiceFormat
from worker.rules.invoice_lines import InvoiceContent, InvoiceLine, InvoicePeriod
from worker.rules.pricing import EntryState
from worker.rules.reconciliation import Reconciliation

BY_CALL = """Account;Called at;Fee
acct_a;22.11.2026 13:00:04;0,10
acct_a;22.11.2026 13:00:05;0,10
acct_c;22.11.2026 13:00:14;0,10
Total;;0,30
"""
MONTHLY = "Description,Calls,Unit price,Amount\nBalance refresh,{},0.10,{}\nTotal,,,{}\n"
Run = Callable[..., Any]


@pytest.fixture
def run(history: LedgerBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Reconcile a text as the invoice of November, in December: acct_a has a posted and a pending call."""
    monkeypatch.setenv("PAYREADY_DATABASE_URL", history.url)
    for module in ("command_line", "reconcile_commands"):
        monkeypatch.setattr(f"cli.{module}.settings", settings.__wrapped__)
    monkeypatch.setattr("cli.reconcile_commands.utc_now", lambda: datetime(2026, 12, 3, tzinfo=UTC))

    def reconcile(text: str, *arguments: str, name: str = "invoice.csv") -> Any:
        (tmp_path / name).write_bytes(text.encode())
        return CliRunner().invoke(
            app, ["fees", "reconcile", str(tmp_path / name), "--month", "2026-11", *map(str, arguments)]
        )

    return reconcile


def test_matching_invoice_has_status_0_and_shows_how_it_was_read(run: Run) -> None:
    result = run(BY_CALL, "--time-zone", "Europe/Berlin")
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert "delimiter ';'" in output
    assert "decimal style '1.234,50'" in output
    assert "time zone 'Europe/Berlin'" in output
    assert "assumed: The account is in the column 'Account' (--account-column)." in output
    assert "line number account from until on invoice 2 2 acct_a 2026-11-22 12:00:04Z" in output
    assert "1 total: in agreement with the lines, no charge" in output
    assert "--apply would post 1 pending call and void 0" in output


def test_profile_of_one_month_reads_the_next_without_options(run: Run, tmp_path: Path) -> None:
    profile = tmp_path / "quiltt.toml"
    assert "give --time-zone" in run(BY_CALL).stderr
    assert run(BY_CALL, "--time-zone", "Europe/Berlin", "--save-profile", profile).exit_code == 0
    assert 'time_zone = "Europe/Berlin"' in profile.read_text()
    result = run("Rechnung;;\n" + BY_CALL, "--profile", profile, "--json")
    report = json.loads(result.output)
    assert (result.exit_code, report["matched"], report["has_differences"]) == (0, 3, False)
    assert report["assumptions"] == ["The header is line 2 (--header-row)."]
    assert report["read_as"]["columns"] == {"account": "Account", "date": "Called at", "amount": "Fee"}
    assert run(BY_CALL, "--profile", profile, "--time-zone", "UTC").exit_code == EXIT_DIFFERENCES, "options come first"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--profile", "missing.toml"), "No such file"),
        (("--html", "missing/a.html"), "no file can be written"),
        (("--save-profile", "missing/a.toml"), "no file can be written"),
        (("--html", "/proc/a.html"), "no file can be written"),
        (("--json", "--csv"), "give only one of them"),
        (("--no-such-option",), "No such option"),
        (("--tolerance-s", "-1"), "Invalid value"),
        (("--date-style", "DD/YY"), "Invalid value"),
    ],
)
def test_wrong_usage_has_status_1_because_2_means_differences(
    run: Run, history: LedgerBuilder, arguments: tuple[str, ...], message: str
) -> None:
    before = history.entries()
    result = run(BY_CALL, "--time-zone", "Europe/Berlin", "--apply", *arguments)
    assert (result.exit_code, message in " ".join(result.stderr.split())) == (1, True), result.stderr
    assert history.entries() == before


def test_file_name_that_is_no_text_is_escaped(run: Run, history: LedgerBuilder, tmp_path: Path) -> None:
    text = MONTHLY.format(3, "0.30", "0.30")
    result = run(text, "--apply", "--html", tmp_path / "report.html", name=os.fsdecode(b"i\xff.csv"))
    assert result.exit_code == 0, result.exception
    assert "i\\udcff.csv" in (tmp_path / "report.html").read_text()
    assert history.entries()[-1][2]["name"] == "i\\udcff.csv"


def test_missing_or_broken_profile_and_invoice_are_one_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_bytes(b"\xff = 1")
    assert "the profile is not TOML" in run(BY_CALL, "--profile", tmp_path / "bad.toml").stderr
    missing = CliRunner().invoke(app, ["fees", "reconcile", str(tmp_path / "\x1b[2Jx"), "--month", "2026-11"])
    assert missing.exit_code == 1
    assert missing.stderr.count("\n") == 1
    assert "\x1b" not in missing.stderr


@pytest.mark.parametrize(("count", "status"), [(2, 0), (3, 0), (4, EXIT_DIFFERENCES), (1, EXIT_DIFFERENCES)])
def test_aggregated_invoice_is_compared_by_counts(run: Run, count: int, status: int) -> None:
    """Two calls are posted, one is pending, and the void one would be the fourth."""
    text = MONTHLY.format(count, f"0.{count}0", f"0.{count}0")
    result = run(text)
    assert result.exit_code == status, result.output
    output = " ".join(result.output.split())
    assert "aggregated by month" in output
    assert f"{count} call" in output
    if count == 4:
        assert "1 difference" in output
        assert "1 call void in the ledger, of which the invoice may charge 1" in output
    report = json.loads(run(text, "--json").output)
    (group,) = report["groups"]
    assert (report["level"], group["count"], group["posted"], group["pending"]) == ("month", count, 2, 1)
    assert report["has_differences"] is (status == EXIT_DIFFERENCES)


@pytest.mark.parametrize(("count", "state"), [(3, "posted"), (2, "void")])
def test_aggregated_invoice_is_applied_once(run: Run, history: LedgerBuilder, count: int, state: str) -> None:
    text = MONTHLY.format(count, f"0.{count}0", f"0.{count}0")
    applied = json.loads(run(text, "--apply", "--json").output)["applied"]
    assert applied == {"posted": int(state == "posted"), "voided": int(state == "void")}
    call, last, evidence = history.entries()[-1]
    assert (call, last, evidence["level"], evidence["lines"]) == ("call_ref_a_1", state, "month", [2])
    entries = history.entries()
    assert "0 pending calls posted, 0 voided" in run(text, "--apply").output
    assert history.entries() == entries


FORMULA = '=HYPERLINK("http://x")'
HOSTILE = f"""Account,Date,Amount,Description
acct_a,2026-11-22,0.12,a
"{FORMULA.replace('"', '""')}",2026-11-22,0.10,a
<script>alert(1)</script>&[bold],2026-11-22,0.10,a
,,-0.01,"Dis\x1b[31mcount"
Total,,0.32,
\x1b]0;title\x07 a note,,,
"""


def test_csv_has_a_row_for_each_finding_and_no_formula(run: Run) -> None:
    result = run(HOSTILE, "--csv")
    assert result.exit_code == EXIT_DIFFERENCES
    rows = list(csv.DictReader(io.StringIO(result.output)))
    assert [row["finding"] for row in rows] == [
        *("price_difference", "unmatched_line", "unmatched_line", "unmatched_call", "pending_free", "credit", "total"),
    ]
    assert [row["on invoice"] for row in rows] == ["0.12", "0.10", "0.10", "", "", "-0.01", "0.32"]
    assert rows[0]["in ledger"] == "0.100000"
    assert {row["account"] for row in rows[1:3]} == {safe_text(FORMULA), "<script>alert(1)</script>&[bold]"}
    assert rows[1]["from"] == "2026-11-22 00:00:00Z"
    assert "\x1b" not in result.output


def test_csv_of_any_invoice_has_the_columns_of_its_page(run: Run) -> None:
    """The page explains each finding, too."""
    page = (ROOT / "docs" / "reference" / "reconciliation-csv.md").read_text()
    source = (ROOT / "worker" / "reports" / "reconciliation_report.py").read_text()
    findings = set(re.findall(r'_section\(\s*"(\w+)"', source))
    assert len(findings) == 14
    explained = set(re.findall(r"`([^`]+)`", page))
    assert findings | set(CSV_COLUMNS) <= explained
    found = set()
    for text in (HOSTILE, *(MONTHLY.format(count, f"0.{count}0", f"0.{count}0") for count in (1, 2, 3, 4))):
        rows = list(csv.DictReader(io.StringIO(run(text, "--csv").output)))
        assert {tuple(row) for row in rows} == {CSV_COLUMNS}
        found |= {row["finding"] for row in rows}
    assert found >= {"difference", "explained", "pending_charged", "pending_free", "total"}


def test_json_has_the_whole_finding(run: Run) -> None:
    report = json.loads(run(HOSTILE, "--json").output)
    assert {line["account_id"] for line in report["unmatched_lines"]} == {FORMULA, "<script>alert(1)</script>&[bold]"}
    assert [credit["amount"] for credit in report["credits"]] == ["-0.01"]
    assert report["totals"] == [{"row": 6, "label": "Total", "amount": "0.32", "is_grand_total": True}]
    assert len(report["first_lines"]) == 3
    assert len(report["digest"]) == 64


ALLOWED_TAGS = set(re.findall(r"\w+", "html head meta title style body h1 h2 p table thead tbody tr th td ul li"))


class _Page(HTMLParser):
    """Collect elements, attributes and texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html_is_one_file_without_scripts_and_addresses(run: Run, tmp_path: Path) -> None:
    """Texts of the invoice are texts of the page, and its control characters are visible escapes."""
    file = tmp_path / "report.html"
    assert run(HOSTILE, "--html", file).exit_code == EXIT_DIFFERENCES
    text = file.read_text()
    page = _Page()
    page.feed(text)
    assert page.tags <= ALLOWED_TAGS
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert "<script>alert(1)</script>&[bold]" in page.texts
    assert FORMULA in page.texts
    assert "2 unmatched lines: not in the ledger" in page.texts
    assert any(text.startswith("Result: differences found. 1 match") for text in page.texts)
    assert "report made at" in page.texts
    assert "2026-12-03 00:00:00Z" in page.texts
    assert "The account is in the column 'Account' (--account-column)." in page.texts
    assert text.replace("\n", "").isprintable()


@pytest.mark.parametrize("arguments", [(), ("--json",), ("--csv",), ("--apply",)])
def test_escape_sequences_of_an_invoice_reach_no_terminal(run: Run, arguments: tuple[str, ...]) -> None:
    for name, text in (
        ("a\x1b[2J.csv", HOSTILE),
        ("b.csv", HOSTILE.replace("acct_a", "\x1b[31m")),
        ("c.csv", HOSTILE.replace("Amount", "Am\x1b[2J")),
        ("d.csv", MONTHLY.format(2, "0.20", "0.20").replace("Balance", "\x1b[2J\x9b1m")),
        ("e.csv", HOSTILE.replace("0.12", "\x1b[2J")),
    ):
        result = run(text, *arguments, name=name)
        assert result.exit_code in (0, 1, EXIT_DIFFERENCES)
        assert (result.output + result.stderr).replace("\n", "").isprintable(), name


@pytest.mark.parametrize("width", [40, 60, 160])
def test_reconciliation_shows_amounts_uncut(width: int) -> None:
    """It shows the amounts of invoice and ledger, and deferred calls."""
    posted, pending = Decimal("1234567.654321"), Decimal("765432.123456")
    call = LedgerCall(call_id="call_" + "0" * 32, account_id=LONG, at=NOON, state=EntryState.VOID, price=posted)
    edge = LedgerCall(call_id="call_edge", account_id=LONG, at=NOON, state=EntryState.PENDING, price=posted)
    charge = InvoiceLine(row=123456, number="17", account_id=LONG, since=NOON, until=NOON, amount=pending)
    period = InvoicePeriod(since=NOON, until=NOON, tolerance=timedelta(0))
    found = Reconciliation(
        period=period,
        currency="USD",
        matched=[LineMatch(line=charge, call=call)],
        unmatched_calls=[edge],
        unmatched_lines=[charge],
        to_void=[],
        deferred_calls=[edge],
    )
    read_as = InvoiceFormat.model_validate(
        {"encoding": "utf-8", "delimiter": ",", "header_row": 1, "columns": {"amount": "Amount"}}
    )
    content = InvoiceContent(
        lines=[charge], aggregated_lines=[], level=None, credits=[], totals=[], format=read_as, assumptions=[]
    )
    name = "Invoice\x1b[2J.csv"
    invoice = flow.Invoice(
        name=name, digest="0" * 64, currency="USD", period=period, content=content, total_matches=False
    )
    report = by_call_report(invoice, found, None)
    output = printed(limited_report_tables(report), width)
    assert {"1234567.654321", "765432.123456", "123456", "void", "pending"} <= set(output.split())
    assert "1 deferred call: pending at the month's boundary" in " ".join(output.split())
    assert "unmatched call" not in output
    assert output.startswith("Invoice\\x1b[2J.csv")
    assert escape_unprintable(name) in report_html(report, NOON)
