"""`payready archive`, and what other commands print about archived months."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlmodel import SQLModel
from typer.testing import CliRunner

from cli.main import app
from config.settings import settings
from demo.processes import ROOT
from tests.cli.conftest import LedgerBuilder
from tests.support.databases import Databases
from tests.support.system import wait_until
from worker.flow import MonthArchive
from worker.ledger.engine import open_engine
from worker.rules.pricing import EntryState, Price
from worker.rules.states import PaymentState

pytestmark = pytest.mark.slow

NOON = datetime(2026, 9, 10, 12, tzinfo=UTC)
NICKEL = Price(per_call=Decimal("0.050000"), currency="USD", price_list="2026-09-11", mode="TEST")
Run = Callable[..., Any]
ARCHIVED_AT = "2026-10-20 00:00:00Z"
TABLES = ("payment", "outcome_delivery", "refresh", "fee_entry", "balance")


@pytest.fixture
def september(databases: Databases) -> Iterator[LedgerBuilder]:
    """A ledger with payments in September: shared, reused, and one without a call."""
    with databases.create() as address:
        ledger = LedgerBuilder(address, open_engine(address, connections=10))
        for number in range(3):
            ledger.payment(f"pay_{number}", "acct_a", NOON, amount=Decimal("5.00"))
        ledger.call("ref_a", "acct_a", EntryState.POSTED, NOON)
        ledger.balance("bal_a", "acct_a", NOON + timedelta(seconds=3), Decimal("60.00"), refresh_id="ref_a")
        for number in range(3):
            ledger.resolve(f"pay_{number}", PaymentState.RELEASED, NOON, refresh_id="ref_a", reused=number == 2)
        ledger.payment("pay_b", "acct_b", NOON + timedelta(days=1))
        ledger.call("ref_b", "acct_b", EntryState.VOID, NOON + timedelta(days=1), NICKEL)
        ledger.resolve("pay_b", PaymentState.FAILED, NOON + timedelta(days=1), reason="timeout", refresh_id="ref_b")
        ledger.payment("pay_c", "acct_c", NOON)
        ledger.resolve("pay_c", PaymentState.FAILED, NOON, reason="timeout")
        with ledger.engine.begin() as connection:
            connection.execute(text("UPDATE refresh SET state = 'answered', due_at = NULL"))
        yield ledger
        ledger.engine.dispose()


@pytest.fixture
def run(september: LedgerBuilder, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command on the ledger on 2026-10-20."""
    monkeypatch.setenv("PAYREADY_DATABASE_URL", september.url)
    monkeypatch.setenv("PAYREADY_REDIS_URL", "redis://127.0.0.1:1/0")
    for module in ("payment_actions", "payment_reports", "command_line", "command_runtime"):
        monkeypatch.setattr(f"cli.{module}.settings", settings.__wrapped__)
    for module in ("statement_commands", "archive_commands"):
        monkeypatch.setattr(f"cli.{module}.utc_now", lambda: datetime(2026, 10, 20, tzinfo=UTC))
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


def _statements(run: Run) -> dict[tuple[str, ...], str]:
    groups: list[tuple[str, ...]] = [(), ("--by", "account"), ("--by", "day")]
    return {
        (*group, *form): run("fees", "statement", "--month", "2026-09", *group, *form).output
        for group in groups
        for form in ((), ("--csv",), ("--json",))
    }


def test_archive_prints_files_and_removed_payments_and_statements_stay(run: Run, tmp_path: Path) -> None:
    """In every group and form. Only the statement by payment is in the files."""
    before = _statements(run)
    assert "saved: 0.05 USD" not in before["--by", "day"]
    assert all("TEST" in output for output in before.values())
    result = run("archive", "--before", "2026-10-01", "--to", tmp_path)
    assert result.output.splitlines() == [
        f"2026-09: refresh 2, fee_entry 4, payment 5, outcome_delivery 5, balance 1 in {tmp_path}/2026-09",
        "    5 payments removed from the ledger",
    ]
    assert _statements(run) == before
    result = run("fees", "statement", "--month", "2026-09", "--by", "payment")
    assert (result.exit_code, f"its payments are in {tmp_path}/2026-09;" in result.output) == (1, True)
    result = run("payment", "show", "pay_1")
    assert (result.exit_code, f"pay_1 was archived on {ARCHIVED_AT}, with {tmp_path}/2026-09" in result.output) == (
        1,
        True,
    )
    assert "no payment pay_x in the ledger" in run("payment", "show", "pay_x").output
    result = run("archive", "verify", tmp_path)
    assert (result.exit_code, "2026-09: complete, refresh 2" in result.output) == (0, True)
    result = run("archive", "--before", "2026-10-01", "--to", tmp_path)
    assert result.output == "there is no month to archive\n"
    result = run("archive", "restore", tmp_path, "--month", "2026-09", "--json")
    assert json.loads(result.output)["inserted"]["payment"] == 5
    assert "pay_1" in run("payment", "show", "pay_1").output


def test_json_has_the_months_that_were_archived_before_one_is_refused(run: Run, tmp_path: Path) -> None:
    result = run("archive", "--before", "2026-11-01", "--to", tmp_path, "--json")
    assert result.exit_code == 1
    done, refused = json.loads(result.stdout)
    assert (done["month"], done["error"], done["removed_payments"]) == ("2026-09", None, 5)
    assert refused["error"].startswith("2026-10 can be archived from 2026-11-08")
    assert result.stderr == f"payready: {refused['error']}\n"


def test_json_has_the_months_that_were_archived_before_the_disk_is_full(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def archive_one_month(*_: object, **__: object) -> Iterator[MonthArchive]:
        yield MonthArchive(month="2026-09", folder=tmp_path, rows={}, removed_payments=5)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cli.archive_commands.flow.archive_months_before", archive_one_month)
    result = run("archive", "--before", "2026-11-01", "--to", tmp_path, "--json")
    assert result.exit_code == 1
    assert [month["month"] for month in json.loads(result.stdout)] == ["2026-09"]
    assert "No space left on device" in result.stderr


@pytest.mark.parametrize("command", ["redeliver", "end-hold", "cancel"])
def test_command_on_an_archived_payment_says_when_it_was_archived(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("cli.payment_actions.celery_client.cancel", lambda *_: False)
    run("archive", "--before", "2026-10-01", "--to", tmp_path)
    result = run("payment", command, "pay_1", "--json")
    assert result.exit_code == 1
    assert result.stderr == f"payready: pay_1 was archived on {ARCHIVED_AT}, with {tmp_path}/2026-09\n"
    assert "unknown" in run("payment", "redeliver", "pay_x").stderr


def test_cancel_needs_no_access_to_the_ledger(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker cancels. Without the ledger, the command cannot say whether the payment is archived."""
    monkeypatch.setattr("cli.payment_actions.celery_client.cancel", lambda *_: False)
    monkeypatch.setenv("PAYREADY_DATABASE_URL", f"sqlite:///{tmp_path}/none.db")
    result = run("payment", "cancel", "pay_1")
    assert result.stderr == "payready: pay_1 was not cancelled: it is already resolved, or unknown\n"


def test_verify_fails_for_a_damaged_file(run: Run, tmp_path: Path) -> None:
    run("archive", "--before", "2026-10-01", "--to", tmp_path, "--json")
    (tmp_path / "2026-09" / "balance.jsonl.gz").write_bytes(b"")
    result = run("archive", "verify", tmp_path)
    assert result.exit_code == 1
    assert "balance.jsonl.gz differs from its checksum; restore it from its backup" in result.output
    [verified] = json.loads(run("archive", "verify", tmp_path, "--json").output)
    assert "balance.jsonl.gz" in verified["error"]


@pytest.mark.parametrize("before", [(), ("--before", "2026-10-02"), ("--before", "2026-10"), ("--before", "x")])
def test_archive_needs_the_first_day_of_a_month(run: Run, before: tuple[str, ...]) -> None:
    result = run("archive", *before)
    assert (result.exit_code, "first day of a month" in result.output) == (2, True)


def test_restore_names_a_month_that_is_not_in_the_folder(run: Run, tmp_path: Path) -> None:
    result = run("archive", "restore", tmp_path, "--month", "2026-08")
    assert (result.exit_code, "2026-08 has no manifest.json, so it is no archive of a month" in result.output) == (
        1,
        True,
    )


def _multiply(ledger: LedgerBuilder, copies: int) -> None:
    """Copy all rows, with other ids, so that the removal takes many steps."""
    keys = {
        "refresh": ("refresh_id", "account_id"),
        "fee_entry": ("call_id", "refresh_id", "account_id"),
        "payment": ("payment_id", "refresh_id", "account_id"),
        "outcome_delivery": ("task_id", "payment_id"),
        "balance": ("balance_id", "refresh_id", "account_id"),
    }
    numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {copies})"
    with ledger.engine.begin() as connection:
        for table, ids in keys.items():
            columns = [column.name for column in SQLModel.metadata.tables[table].columns if column.name != "entry_id"]
            names = ", ".join(f'"{name}"' for name in columns)
            values = ", ".join(f"{name} || '_' || i" if name in ids else f't."{name}"' for name in columns)
            order = "ORDER BY t.state <> 'pending'" if table == "fee_entry" else ""
            connection.execute(
                text(f"INSERT INTO {table} ({names}) {numbers} SELECT {values} FROM {table} t, n WHERE true {order}")
            )


def _counts(ledger: LedgerBuilder) -> dict[str, int]:
    with ledger.engine.connect() as connection:
        return {name: connection.scalar(text(f"SELECT count(*) FROM {name}")) or 0 for name in TABLES}


@pytest.mark.slow
def test_archive_that_is_killed_while_it_removes_rows_continues(
    september: LedgerBuilder, run: Run, tmp_path: Path
) -> None:
    """The process gets SIGKILL. The statement is right before and after the second run, and no row is lost."""
    _multiply(september, 3000)
    rows, statements = _counts(september), _statements(run)
    command = ["payready", "archive", "--before", "2026-10-01", "--to", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=_environ(september), stdout=subprocess.DEVNULL)
    wait_until(lambda: _counts(september)["payment"] < rows["payment"], 60, "the first rows are removed")
    process.kill()
    process.wait()
    left = _counts(september)
    assert 0 < left["payment"] < rows["payment"]
    assert left["payment"] == left["outcome_delivery"]
    assert _statements(run) == statements
    subprocess.run(command, cwd=ROOT, env=_environ(september), check=True, timeout=100, stdout=subprocess.DEVNULL)
    assert set(_counts(september).values()) == {0}
    assert _statements(run) == statements
    run("archive", "restore", tmp_path, "--month", "2026-09")
    assert _counts(september) == rows


def _environ(ledger: LedgerBuilder) -> dict[str, str]:
    return {"PATH": str(Path(sys.executable).parent), "PAYREADY_DATABASE_URL": ledger.url}
