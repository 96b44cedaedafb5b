"""Commands of `payready`: output and exit status."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cli import render
from cli.command_line import EXIT_FAILED
from cli.main import app
from config.production_rules import EXAMPLE_PRICE_LIST
from config.settings import settings
from tests.cli.conftest import NOON, LedgerBuilder
from worker.rules.pricing import Price

Run = Callable[..., Any]


@pytest.fixture
def run(history: LedgerBuilder, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command on a ledger with a history, without a broker."""
    monkeypatch.setenv("PAYREADY_DATABASE_URL", history.url)
    monkeypatch.setenv("PAYREADY_REDIS_URL", "redis://127.0.0.1:1/0")
    for module in ("payment_actions", "payment_reports", "command_line", "command_runtime", "doctor_command"):
        monkeypatch.setattr(f"cli.{module}.settings", settings.__wrapped__)
    for module in ("pending_calls_command", "statement_commands", "reconcile_commands"):
        monkeypatch.setattr(f"cli.{module}.utc_now", lambda: datetime(2026, 12, 3, tzinfo=UTC))
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_payment_show_prints_events_in_order_of_time(run: Run) -> None:
    """It also prints the funds calculation, the fee share, and undelivered outcomes."""
    output = run("payment", "show", "pay_3").output
    steps = ["failed: insufficient_funds", "job accepted", "call_ref_a_0", "fee posted", "bal_a", "failed  "]
    assert [output.index(step) for step in steps] == sorted(output.index(step) for step in steps)
    assert "needed 25.00 USD; available 10.00 USD = 60.00 balance - 50.00 held for 2 payments" in output
    assert (
        "fee: 0.066666 USD pending, not known yet whether Quiltt charges all calls: share of 0.20 USD among 3 payments"
        in output
    )
    assert "outcome not delivered yet: task-pay_3" in output
    output = run("payment", "show", "pay_reused").output
    assert "fee: none, because it reused the balance of an earlier call, which saved 0.10 USD" in output


def test_payment_show_prints_balance_that_is_not_applied_yet(run: Run, history: LedgerBuilder) -> None:
    """Only balances that arrived after the request of a waiting payment."""
    history.balance("bal_old", "acct_c", NOON + timedelta(seconds=12), Decimal("10.00"), is_applied=False)
    assert "not applied yet" not in run("payment", "show", "pay_waits").output
    history.balance("bal_new", "acct_c", NOON + timedelta(seconds=15), Decimal("10.00"), is_applied=False)
    assert "1 balance arrived and is not applied yet: bal_new" in run("payment", "show", "pay_waits").output
    shown = json.loads(run("payment", "show", "pay_waits", "--json").output)
    assert [balance["balance_id"] for balance in shown["unapplied_balances"]] == ["bal_new"]


def test_reports_have_json_form(run: Run) -> None:
    """Amounts are strings, times are in UTC with Z."""
    shown = json.loads(run("payment", "show", "pay_1", "--json").output)
    assert shown["payment"]["fee"]["amount"] == "0.066667"
    assert shown["payment"]["requested_at"] == "2026-11-22T12:00:01Z"
    listed = json.loads(run("payment", "list", "--state", "waiting", "--json").output)
    assert [line["payment_id"] for line in listed] == ["pay_waits"]
    stated = json.loads(run("fees", "statement", "--month", "2026-11", "--json").output)
    saved = {"shared": 2, "by_sharing": "0.400000", "reused": 1, "by_reuse": "0.100000"}
    counts = {"calls": 4, "posted": 2, "pending": 1, "void": 1}
    sums = {"posted_amount": "0.200000", "pending_amount": "0.100000"}
    assert stated["totals"] == {"USD": {**counts, **sums, "saved": saved}}
    (line,) = stated["lines"]
    assert line == {"key": "2026-11-22", "price": "0.100000", "currency": "USD", **counts, **sums, "saved": None}


def test_every_command_has_json_option() -> None:
    """Programs do not parse text for people."""

    def commands(group: Any, prefix: str = "payready") -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            yield from (
                commands(command, f"{prefix} {name}")
                if hasattr(command, "commands")
                else [(f"{prefix} {name}", command)]
            )

    root: Any = typer.main.get_command(app)
    root.load_all()
    found = dict(commands(root))
    assert len(found) > 15
    assert [
        name for name, command in found.items() if "--json" not in {o for p in command.params for o in p.opts}
    ] == []


def test_tables_show_states_fees_and_savings(run: Run) -> None:
    """Plurals are right."""
    output = run("payment", "list").output
    assert all(cell in output for cell in ("pay_waits", "insufficient_funds", "0.066667 pending", "reused"))
    stated = run("fees", "statement", "--month", "2026-11").output
    assert "4 calls: 0.20 USD posted, 0.10 USD pending (no response received)" in stated
    assert "saved: 0.40 USD by sharing (2 payments), 0.10 USD by reuse (1 payment)" in stated
    assert "no calls" in run("fees", "statement", "--month", "2026-10").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["payment", "show", "pay_unknown"], "no payment pay_unknown in the ledger"),
        (["payment", "cancel", "pay_1"], "cannot reach the broker or the result backend"),
        (["payment", "enqueue", "acct_a", "--amount", "25.00"], "cannot reach the broker or the result backend"),
        (["payment", "enqueue", "acct_a", "--amount", "-1"], "amount: "),
        (["payment", "enqueue", "acct_a", "--timeout-s", "0"], "timeout_s: "),
    ],
)
def test_expected_error_is_one_sentence(run: Run, arguments: list[str], message: str) -> None:
    """The exit status is 1, and there is no traceback."""
    result = run(*arguments)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert result.stderr.startswith("payready: ")
    assert message in result.stderr


@pytest.mark.parametrize("by", ["account", "day", "payment"])
def test_statement_is_equal_as_table_json_and_csv(run: Run, by: str) -> None:
    """All three have the same lines."""
    arguments = ["fees", "statement", "--month", "2026-11", "--by", by]
    report = json.loads(run(*arguments, "--json").output)["lines"]
    csv_rows = list(csv.DictReader(io.StringIO(run(*arguments, "--csv").output)))
    name = "payment_id" if by == "payment" else "key"
    assert [row[by] for row in csv_rows] == [line[name] or "" for line in report]
    amount = "fee" if by == "payment" else "posted_amount"
    assert [row[amount.replace("_", " ")] for row in csv_rows] == [line[amount] for line in report]
    table = run(*arguments).output
    assert all((line[name] or "(no payment)") in table for line in report)
    assert run(*arguments, "--json", "--csv").exit_code == 2


COUNTED = "currency,calls,posted calls,pending calls,void calls,posted amount,pending amount,highest final amount"
SAVED = "payments sharing a call,saved by sharing,payments with a reused balance,saved by reuse"
HEADS = {
    None: f"period,time zone,mode,price list,price,{COUNTED}",
    "account": f"period,time zone,mode,account,{COUNTED},{SAVED}",
    "day": f"period,time zone,mode,day,{COUNTED},{SAVED}",
    "payment": "period,time zone,mode,payment,account,refresh,payments sharing the fee,fee,currency,state,saved",
}


@pytest.mark.parametrize("by", HEADS)
def test_csv_without_lines_has_header(run: Run, by: str | None) -> None:
    """The columns do not depend on the lines."""
    arguments = ["fees", "statement", "--csv", *(["--by", by] if by else [])]
    empty = run(*arguments, "--month", "2026-10").output
    full = run(*arguments, "--month", "2026-11").output
    assert empty == HEADS[by] + "\n"
    assert full.splitlines()[0] == HEADS[by]
    assert {line.count(",") for line in full.splitlines()} == {HEADS[by].count(",")}
    if by == "account":
        assert full.splitlines()[1] == (
            "2026-11,UTC,unknown,acct_a,USD,2,1,1,0,0.100000,0.100000,0.200000,2,0.400000,1,0.100000"
        )


INVOICE = """Acct,When,Fee,No
acct_a,2026-11-22T12:00:04Z,0.10,1
acct_a,2026-11-22T12:00:05Z,0.12,2
acct_x,2026-11-22T12:00:05Z,0.10,3
"""
COMPLETE_INVOICE = INVOICE + "acct_c,2026-11-22T12:00:14Z,0.10,4\n"
MAPPED = ["--account-column", "Acct", "--date-column", "When", "--amount-column", "Fee", "--number-column", "No"]


def reconcile(run: Run, folder: Path, *arguments: str, text: str = INVOICE, month: str = "2026-11") -> Any:
    """Reconcile this text as an invoice."""
    (folder / "invoice.csv").write_text(text)
    return run("fees", "reconcile", str(folder / "invoice.csv"), "--month", month, *MAPPED, *arguments)


def test_reconcile_prints_matches_and_differences(run: Run, tmp_path: Path) -> None:
    """Options map the columns. Without --apply nothing changes."""
    report = json.loads(reconcile(run, tmp_path, "--json").output)
    assert (report["matched"], report["applied"]) == (2, None)
    assert [(m["line"]["number"], m["call"]["price"]) for m in report["price_differences"]] == [("2", "0.100000")]
    assert [line["account_id"] for line in report["unmatched_lines"]] == ["acct_x"]
    assert [(call["account_id"], call["state"]) for call in report["unmatched_calls"]] == [("acct_c", "posted")]
    assert (len(report["to_post"]), report["to_void"]) == (1, [])
    output = reconcile(run, tmp_path).output
    assert "2 matches: 0.22 USD on the invoice, 0.20 USD in the ledger" in output
    assert "1 price difference" in output
    assert "1 unmatched line: not in the ledger" in output
    assert "1 unmatched call: not on the invoice" in output
    assert "--apply would post 1 pending call and void 0" in output
    assert len(json.loads(run("fees", "pending", "--json").output)) == 1


def test_applied_invoice_posts_and_voids_pending_calls_once(run: Run, history: LedgerBuilder, tmp_path: Path) -> None:
    """Posted entries have the line as evidence. A second apply changes nothing."""
    history.call("ref_d", "acct_d", None, datetime(2026, 11, 23, tzinfo=UTC))
    assert "1 pending call posted, 1 voided" in reconcile(run, tmp_path, "--apply", text=COMPLETE_INVOICE).output
    entries = history.entries()
    assert "0 pending calls posted, 0 voided" in reconcile(run, tmp_path, "--apply", text=COMPLETE_INVOICE).output
    assert history.entries() == entries
    posted, void = (evidence for _, _, evidence in entries[-2:])
    assert (posted["line"], posted["number"], posted["amount"], posted["period"]) == (3, "2", "0.12", "2026-11")
    assert (void["line"], void["name"]) == (None, "invoice.csv")
    assert posted["digest"] == void["digest"]
    assert json.loads(run("fees", "pending", "--json").output) == []
    assert "0.30 USD posted" in run("fees", "statement", "--month", "2026-11").output


INVALID_INVOICES = [
    (INVOICE.replace("0.12", "free"), "2026-11", "line 3: Fee is not an amount written as 1,234.50"),
    (INVOICE.replace("Fee", "Sum"), "2026-11", "no column 'Fee' (--amount-column)"),
    (INVOICE, "2026-10", "line 2: 2026-11-22 is not in 2026-10"),
    (INVOICE.replace("acct_a", "acct_y"), "2026-11", "none of the 3 lines matches a call of the ledger"),
    (INVOICE.replace("2026-11-22", "2026-12-02"), "2026-12", "2026-12 is not over"),
    (INVOICE.splitlines()[0], "2026-11", "no charges after its header"),
    (INVOICE, "2026-11", "the invoice omits 1 accepted call"),
]


def test_wrong_invoice_is_rejected_as_a_whole(run: Run, history: LedgerBuilder, tmp_path: Path) -> None:
    """The error has the line and the reason, and no entry changes."""
    before = history.entries()
    for text, month, message in INVALID_INVOICES:
        result = reconcile(run, tmp_path, "--apply", text=text, month=month)
        assert (result.exit_code, type(result.exception)) == (1, SystemExit)
        assert message in result.stderr
    assert history.entries() == before


def test_invoice_covers_only_calls_in_its_currency(run: Run, history: LedgerBuilder, tmp_path: Path) -> None:
    """A line in another currency is rejected."""
    euro = Price(per_call=Decimal("0.10"), currency="EUR", price_list="2026-11-22")
    history.call("ref_a", "acct_a", None, datetime(2026, 11, 22, 12, 0, 5, tzinfo=UTC), euro)
    history.call("ref_more", "acct_e", None, datetime(2026, 11, 23, tzinfo=UTC), euro)
    assert "1 pending call posted, 0 voided" in reconcile(run, tmp_path, "--apply", text=COMPLETE_INVOICE).output
    text = "Acct,When,Fee,No,Cur\nacct_a,2026-11-22,0.10,1,EUR\n"
    output = reconcile(run, tmp_path, "--currency-column", "Cur", text=text).stderr
    assert "line 2: Cur is 'EUR', but the calls are in USD" in output
    applied = reconcile(run, tmp_path, "--currency-column", "Cur", "--currency", "EUR", "--apply", "--json", text=text)
    assert json.loads(applied.output)["applied"] == {"posted": 1, "voided": 1}
    assert [(call, state) for call, state, _ in history.entries()[-2:]] == [
        ("call_ref_a_2", "posted"),
        ("call_ref_more_0", "void"),
    ]
    assert reconcile(run, tmp_path, "--currency", "euro").exit_code == EXIT_FAILED


def test_invoice_with_matching_total_is_applied_despite_missing_call(
    run: Run, history: LedgerBuilder, tmp_path: Path
) -> None:
    """A file whose lines do not add up to the total is rejected."""
    before = history.entries()
    result = reconcile(run, tmp_path, "--apply", "--total", "0.42")
    assert (result.exit_code, history.entries()) == (1, before)
    assert "the 3 lines add up to 0.32, but --total is 0.42" in result.stderr
    assert "1 pending call posted, 0 voided" in reconcile(run, tmp_path, "--apply", "--total", "0.32").output
    assert reconcile(run, tmp_path, "--total", "0,32").exit_code == EXIT_FAILED


def test_second_invoice_resolves_calls_at_month_boundary(run: Run, history: LedgerBuilder, tmp_path: Path) -> None:
    """A call on neither invoice is voided. A call on the first invoice does not match a line of the second."""
    month_start = datetime(2026, 11, 1, tzinfo=UTC)
    history.call("ref_charged", "acct_m", None, month_start - timedelta(seconds=20))
    history.call("ref_free", "acct_f", None, month_start - timedelta(seconds=10))
    charge = "acct_m,2026-11-01T00:00:01Z,0.10,9\n"
    october = reconcile(run, tmp_path, "--apply", "--json", text="Acct,When,Fee,No\n" + charge, month="2026-10")
    report = json.loads(october.output)
    assert (report["applied"], report["deferred_calls"]) == ({"posted": 1, "voided": 0}, ["call_ref_free_0"])
    november = json.loads(reconcile(run, tmp_path, "--apply", "--json", text=COMPLETE_INVOICE + charge).output)
    assert (november["applied"], november["to_void"]) == ({"posted": 1, "voided": 1}, ["call_ref_free_0"])
    assert [line["account_id"] for line in november["unmatched_lines"]] == ["acct_m", "acct_x"]


def test_invoice_in_another_encoding_is_read(run: Run, tmp_path: Path) -> None:
    """Accounts keep their letters."""
    (tmp_path / "invoice.csv").write_bytes(INVOICE.encode().replace(b"acct_x", b"acct_\xe9"))
    result = run("fees", "reconcile", str(tmp_path / "invoice.csv"), "--month", "2026-11", *MAPPED, "--json")
    assert [line["account_id"] for line in json.loads(result.output)["unmatched_lines"]] == ["acct_\xe9"]


@pytest.mark.parametrize("month", ["2026-13", "2026-1", "26-11", "0000-01", "9999-12", "november"])
def test_invalid_month_is_rejected(run: Run, month: str) -> None:
    """The exit status is that of wrong usage."""
    assert run("fees", "statement", "--month", month).exit_code == 2


def test_error_names_misspelt_setting_and_missing_database(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator knows what to change."""
    monkeypatch.setenv("PAYREADY_DATABASE_URL", "postgresql://u@127.0.0.1:1/x")
    said = run("payment", "list").stderr
    assert re.search(
        "the database did not respond: OperationalError: .*; check PAYREADY_DATABASE_URL, or try again", said
    )
    monkeypatch.setenv("PAYREADY_DATABASE_URI", "x")
    assert "PAYREADY_DATABASE_URI is not a setting of payready" in run("payment", "list").stderr


def test_error_of_database_without_tables_names_the_role_release(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The address is right, so the error does not mention it."""
    (tmp_path / "new.db").touch()
    monkeypatch.setenv("PAYREADY_DATABASE_URL", f"sqlite:///{tmp_path}/new.db")
    said = run("payment", "list").stderr
    assert said == "payready: the database is behind this release; run the role `release`: alembic upgrade head\n"


@pytest.mark.parametrize(
    "command",
    [
        "payment show pay_1",
        "payment list",
        "payment redeliver pay_1",
        "payment end-hold pay_1",
        "fees statement",
        "fees statement --by payment",
        "fees pending",
        "fees reconcile invoice.csv --month 2026-11 --currency USD",
        "fees reconcile invoice.csv --month 2026-10 --currency USD --apply",
        "quarantine list",
        "quarantine show qua_1",
        "quarantine replay --all",
        "quarantine delete qua_1",
    ],
)
def test_command_in_an_empty_folder_creates_no_database(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    """It names the file, the setting, and the role that creates the database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PAYREADY_DATABASE_URL", raising=False)
    for module in (
        "payment_actions",
        "payment_reports",
        "command_line",
        "command_runtime",
        "webhook_commands",
        "reconcile_commands",
    ):
        monkeypatch.setattr(f"cli.{module}.settings", settings.__wrapped__)
    month = "2026-10" if "--apply" in command else "2026-11"
    (tmp_path / "invoice.csv").write_text(f"account_id,date,amount\nacct_a,{month}-22,0.10\n")
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 1
    assert result.stderr == (
        f"payready: there is no database at {tmp_path}/payready.db (PAYREADY_DATABASE_URL); "
        "correct the setting, or create it with the role `release`: alembic upgrade head\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["invoice.csv"]


@pytest.mark.parametrize(
    "command",
    [
        "doctor",
        "reconcile-after-failover",
        "payment redeliver p",
        "quarantine replay --all",
        "dead-letters delete --all --yes",
    ],
)
def test_command_in_production_uses_no_default_address(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    """A command on the demo's database and Redis would find nothing to do, whatever happened."""
    (tmp_path / "prices.toml").write_bytes(EXAMPLE_PRICE_LIST.read_bytes())
    monkeypatch.setenv("PAYREADY_ENV", "production")
    monkeypatch.setenv("PAYREADY_PRICE_LIST_FILE", str(tmp_path / "prices.toml"))
    monkeypatch.delenv("PAYREADY_DATABASE_URL")
    completed = run(*command.split())
    assert completed.exit_code == EXIT_FAILED
    assert completed.stderr.startswith("payready: PAYREADY_DATABASE_URL must be set in production, to")


def test_error_of_broker_names_the_settings_of_its_address(run: Run) -> None:
    """The broker may have another address than Redis."""
    said = run("payment", "cancel", "pay_1").stderr
    assert "refused. Check PAYREADY_BROKER_URL and PAYREADY_RESULT_BACKEND_URL, or PAYREADY_REDIS_URL" in said


def test_json_of_unknown_type_is_an_error() -> None:
    """It must not become text that looks like data."""
    unknown: Any = object()
    with pytest.raises(TypeError):
        render.as_json(unknown)
