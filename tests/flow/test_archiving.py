"""Archive of months: files, final statements, and the removal of rows, on both databases."""

import gzip
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests.support.databases import Databases
from tests.support.in_process import PRICES, InProcessSystem
from worker import flow
from worker.errors import CallNotSent, CallRejected, CallResultUnknown, FailureReason, PaymentNotReady
from worker.flow import MonthArchive, VerifiedMonth, archive_files, archive_verification, archiving
from worker.ledger import archive_removal, archived_months, funds_holds
from worker.ledger.engine import Engine, open_engine, read_snapshot, transaction
from worker.ledger.fee_statement import statement_lines
from worker.ledger.payment_shares import payment_shares_and_unshared_fees
from worker.rules.archive_manifest import ArchiveError
from worker.rules.invoice_lines import InvoiceError, InvoicePeriod
from worker.rules.invoice_reading import ReadingOptions
from worker.rules.months import Month, month_of
from worker.rules.pricing import parse_price_list

pytestmark = pytest.mark.slow

NOVEMBER, DECEMBER = (month_of(datetime(2026, month, 1, tzinfo=UTC)) for month in (11, 12))
JANUARY = DECEMBER.following
END_OF_NOVEMBER = DECEMBER.since
AFTER_NOVEMBER = datetime(2026, 12, 9, 12, tzinfo=UTC)
AFTER_DECEMBER = datetime(2027, 1, 9, 12, tzinfo=UTC)
AFTER_JANUARY = datetime(2027, 2, 9, 12, tzinfo=UTC)
TABLES = ("payment", "outcome_delivery", "refresh", "fee_entry", "balance")


@pytest.fixture
def november(payready: InProcessSystem) -> InProcessSystem:
    """A system with a history in November: shared, reused, rejected, failed and uncalled payments."""
    payready.rt.price_list = parse_price_list(PRICES + '[[price]]\nmode = "TEST"\nfrom = 2026-11-23\nper_call = "0.07"')
    _pay(payready, "shared", payments=3)
    _pay(payready, "reused", payments=1, max_balance_age_s=600)
    payready.initiate("reused-later", "acct_reused", amount="1.00", max_balance_age_s=600)
    payready.run_tasks()
    payready.provider.script["acct_rejected"] = [CallRejected(404, FailureReason.ACCOUNT_NOT_FOUND, "HTTP 404")]
    payready.initiate("rejected", "acct_rejected")
    payready.run_tasks()
    payready.provider.script["acct_unsent"] = [CallNotSent("no connection")] * 9
    payready.initiate("unsent", "acct_unsent", timeout_s=4)
    payready.run_tasks()
    payready.initiate("uncalled", "acct_uncalled", timeout_s=3, metadata={"text": "\x00 \ud800 ü"})
    payready.drop_tasks()
    payready.clock.advance(6)
    payready.run_maintenance()
    payready.clock.advance(86_400)  # the next day has another price
    payready.run_maintenance()
    _pay(payready, "later", payments=2)
    assert {row["state"] for row in payready.rows("SELECT state FROM payment")} == {"released", "failed"}
    return payready


def _pay(payready: InProcessSystem, name: str, *, payments: int, **job: Any) -> None:
    """Release payments of one account that share a call."""
    for number in range(payments):
        payready.initiate(f"{name}-{number}", f"acct_{name}", amount="5.00", hold_s=60, **job)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.balance(f"acct_{name}", "100.00")
    payready.run_tasks()


def _archive(payready: InProcessSystem, folder: Path, until: datetime = END_OF_NOVEMBER) -> list[MonthArchive]:
    pauses: list[float] = []
    archived = list(
        flow.archive_months_before(payready.engine, until, folder, clock=payready.clock, pause=pauses.append)
    )
    assert pauses or not archived
    return archived


def _counts(engine: Engine) -> dict[str, int]:
    with engine.connect() as connection:
        return {name: connection.scalar(text(f"SELECT count(*) FROM {name}")) or 0 for name in TABLES}


def _ledger_rows(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    """Return all rows, without the numbers of fee entries."""
    rows: dict[str, list[dict[str, Any]]] = {}
    with engine.connect() as connection:
        for name in TABLES:
            found = [dict(row) for row in connection.execute(text(f"SELECT * FROM {name}")).mappings()]
            rows[name] = sorted(
                ({key: value for key, value in row.items() if key != "entry_id"} for row in found), key=repr
            )
    return rows


def _statements(engine: Engine, month: Month = NOVEMBER) -> dict[str, Any]:
    with read_snapshot(engine) as tx:
        statements: dict[str, Any] = {
            by: [repr(line) for line in archived_months.month_statement(tx, month, by)] for by in archived_months.GROUPS
        }
        statements["saved"] = repr(archived_months.month_savings(tx, month))
    return statements


def _raise(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def _interrupt_before_removal(payready: InProcessSystem, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(archiving, "_remove_rows", _raise)
        with pytest.raises(KeyboardInterrupt):
            _archive(payready, folder)


def _execute(payready: InProcessSystem, statement: str) -> None:
    with payready.engine.begin() as connection:
        connection.execute(text(statement))


def _file_rows(folder: Path, month: str, table: str) -> list[dict[str, Any]]:
    return list(archive_files.read_rows(folder / month, table))


def test_archived_month_has_the_same_statement_and_no_rows(november: InProcessSystem, tmp_path: Path) -> None:
    before, rows = _statements(november.engine), _counts(november.engine)
    assert len(before["price"]) == 2
    assert len(before["day"]) == 2
    november.clock.now = AFTER_NOVEMBER
    [archived] = _archive(november, tmp_path)
    assert archived.rows == rows
    assert archived.removed_payments == rows["payment"] == 10
    assert not archived.kept
    assert set(_counts(november.engine).values()) == {0}
    assert _statements(november.engine) == before
    assert _archive(november, tmp_path) == []
    assert [(tmp_path / "2026-11" / f"{name}.jsonl.gz").stat().st_mode & 0o777 for name in TABLES] == [0o600] * 5


def test_restored_month_has_the_same_rows_and_is_restored_once(
    november: InProcessSystem, databases: Databases, tmp_path: Path
) -> None:
    """In the ledger and in another database. There the statement of the rows equals the stored one."""
    rows, statements = _ledger_rows(november.engine), _statements(november.engine)
    november.clock.now = AFTER_NOVEMBER
    _archive(november, tmp_path)
    inserted = flow.restore_month(november.engine, tmp_path, "2026-11")
    assert inserted == {name: len(rows[name]) for name in TABLES}
    assert set(flow.restore_month(november.engine, tmp_path, "2026-11").values()) == {0}
    assert _ledger_rows(november.engine) == rows
    with databases.create() as address:
        other = open_engine(address, connections=1)
        flow.restore_month(other, tmp_path, "2026-11")
        assert _ledger_rows(other) == rows
        assert _statements(other) == statements
        with read_snapshot(other) as tx:
            shares = list(payment_shares_and_unshared_fees(tx, NOVEMBER.since, NOVEMBER.until))
            lines = statement_lines(tx, NOVEMBER.since, NOVEMBER.until, "price")
        assert sum(share.fee for share in shares) == sum(line.posted_amount for line in lines)
        [verified] = flow.verify_archive(other, tmp_path)
        assert isinstance(verified, VerifiedMonth)
        assert not verified.is_in_ledger
        other.dispose()


def test_restored_rows_are_removed_with_the_next_month(november: InProcessSystem, tmp_path: Path) -> None:
    november.clock.now = AFTER_NOVEMBER
    _archive(november, tmp_path)
    flow.restore_month(november.engine, tmp_path, "2026-11")
    november.clock.now = AFTER_DECEMBER
    before = _statements(november.engine)
    [december] = _archive(november, tmp_path, DECEMBER.until)
    assert december.removed_payments == 10
    assert set(_counts(november.engine).values()) == {0}
    assert _statements(november.engine) == before
    assert all(isinstance(month, VerifiedMonth) for month in flow.verify_archive(november.engine, tmp_path))


@pytest.mark.parametrize("job", [{}, {"amount": "7.00"}], ids=["the same job", "another job"])
def test_repeated_job_of_an_archived_payment_is_refused_as_a_conflict(
    november: InProcessSystem, tmp_path: Path, job: dict[str, Any]
) -> None:
    """Its payment was released before: it must not be paid again. Nothing is stored."""
    november.clock.now = AFTER_NOVEMBER
    _archive(november, tmp_path)
    with pytest.raises(PaymentNotReady, match="archived with 2026-11") as refused:
        november.initiate("shared-0", "acct_shared", **{"amount": "5.00", "hold_s": 60, **job})
    assert refused.value.reason == FailureReason.CONFLICT
    november.initiate("new", "acct_shared", amount="5.00")
    november.run_tasks()
    assert _counts(november.engine)["payment"] == 1
    assert november.provider.calls[-1] == "acct_shared"


def test_pending_call_keeps_its_month_from_being_archived(november: InProcessSystem, tmp_path: Path) -> None:
    november.provider.script["acct_lost"] = [CallResultUnknown("timeout")] * 2
    november.initiate("lost", "acct_lost", timeout_s=60)
    november.run_tasks()
    november.pass_time(90)
    november.clock.now = AFTER_NOVEMBER
    before = _counts(november.engine)
    with pytest.raises(ArchiveError, match=r"2026-11 has 2 pending calls \(.*payready fees reconcile --apply"):
        _archive(november, tmp_path)
    assert _counts(november.engine) == before


def test_waiting_payment_keeps_its_month_from_being_archived(november: InProcessSystem, tmp_path: Path) -> None:
    november.initiate("waits", "acct_waits", timeout_s=60)
    november.drop_tasks()
    november.clock.now = AFTER_NOVEMBER
    with pytest.raises(ArchiveError, match=r"2026-11 has 1 waiting payment \(waits\)"):
        _archive(november, tmp_path)


def test_month_is_archived_seven_days_after_its_end_at_the_earliest(november: InProcessSystem, tmp_path: Path) -> None:
    november.clock.now = END_OF_NOVEMBER + timedelta(days=7, seconds=-1)
    with pytest.raises(ArchiveError, match="2026-11 can be archived from 2026-12-08T00:00:00Z on"):
        _archive(november, tmp_path)
    november.clock.advance(1)
    assert _archive(november, tmp_path)


def test_undelivered_outcome_and_funds_hold_keep_their_payments(november: InProcessSystem, tmp_path: Path) -> None:
    """Their refreshes stay, with their calls. The archive of the next month removes them, when nothing needs them."""
    with november.engine.begin() as connection:
        connection.execute(
            text("UPDATE outcome_delivery SET due_at = delivered_at, delivered_at = NULL WHERE payment_id = 'shared-1'")
        )
        hold = "UPDATE payment SET hold_until = '2026-12-20 00:00:00+00' WHERE payment_id = 'later-0'"
        is_sqlite = november.engine.dialect.name == "sqlite"
        connection.execute(text(hold.replace("+00'", ".000000'") if is_sqlite else hold))
    before = _statements(november.engine)
    november.clock.now = AFTER_NOVEMBER
    [archived] = _archive(november, tmp_path)
    assert archived.kept == {"outcome undelivered": 1, "funds hold not ended": 1}
    assert archived.removed_payments == 5
    kept = {row["payment_id"] for row in november.rows("SELECT payment_id FROM payment")}
    assert kept == {"shared-0", "shared-1", "shared-2", "later-0", "later-1"}
    assert _counts(november.engine) == {
        "payment": 5, "outcome_delivery": 5, "refresh": 2, "fee_entry": 4, "balance": 2
    }  # fmt: skip
    assert _statements(november.engine) == before
    november.run_maintenance()
    november.clock.now = AFTER_DECEMBER
    [archived] = _archive(november, tmp_path, DECEMBER.until)
    assert not archived.kept
    assert archived.removed_payments == 5
    assert set(_counts(november.engine).values()) == {0}
    assert _statements(november.engine) == before


def test_call_near_the_end_of_the_month_stays_until_the_next_archive(november: InProcessSystem, tmp_path: Path) -> None:
    """The next invoice may charge it, and its payment may be resolved in the next month. Both statements stay right."""
    november.clock.now = END_OF_NOVEMBER - timedelta(seconds=1)
    november.initiate("edge", "acct_edge", amount="5.00")
    november.initiate("edge-2", "acct_edge", amount="5.00")
    november.run_tasks()
    november.clock.advance(3)
    november.balance("acct_edge")
    november.run_tasks()
    november.clock.advance(86_400)
    _pay(november, "december", payments=2)
    november.clock.now = AFTER_NOVEMBER
    statements = [_statements(november.engine, month) for month in (NOVEMBER, DECEMBER)]
    [archived] = _archive(november, tmp_path)
    assert archived.kept == {"called at the end of the month": 1}
    assert [_statements(november.engine, month) for month in (NOVEMBER, DECEMBER)] == statements
    november.clock.now = AFTER_DECEMBER
    [archived] = _archive(november, tmp_path, DECEMBER.until)
    assert archived.removed_payments == 4
    assert set(_counts(november.engine).values()) == {0}
    assert [_statements(november.engine, month) for month in (NOVEMBER, DECEMBER)] == statements
    assert all(isinstance(month, VerifiedMonth) for month in flow.verify_archive(november.engine, tmp_path))


def test_payment_that_changes_after_the_copy_stays(
    november: InProcessSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator redelivers an outcome between the copy and the removal: the row differs from its copy."""
    november.clock.now = AFTER_NOVEMBER
    _interrupt_before_removal(november, tmp_path, monkeypatch)
    flow.redeliver(november.rt, "rejected")
    november.clock.advance(20)
    november.run_maintenance()
    november.clock.advance(86_400)
    [archived] = _archive(november, tmp_path)
    assert archived.kept == {"changed lately": 1}
    assert archived.removed_payments == 9


def test_balance_that_is_applied_after_the_copy_stays(
    november: InProcessSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files have it as unapplied. The archive of the next month has it as it is in the ledger."""
    _execute(november, "UPDATE balance SET due_at = received_at WHERE account_id = 'acct_shared'")
    november.clock.now = AFTER_NOVEMBER
    _interrupt_before_removal(november, tmp_path, monkeypatch)
    _execute(november, "UPDATE balance SET due_at = NULL")
    _archive(november, tmp_path)
    assert [row["account_id"] for row in november.rows("SELECT account_id FROM balance")] == ["acct_shared"]
    november.clock.now = AFTER_DECEMBER
    _pay(november, "december", payments=1)
    _archive(november, tmp_path, DECEMBER.until)
    assert [row["account_id"] for row in november.rows("SELECT account_id FROM balance")] == ["acct_december"]
    assert [row["due_at"] for row in _file_rows(tmp_path, "2026-12", "balance")] == [None]


def test_refresh_that_changes_after_the_copy_stays(
    november: InProcessSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late balance answers it."""
    _execute(november, "UPDATE refresh SET state = 'unanswered' WHERE account_id = 'acct_later'")
    november.clock.now = AFTER_NOVEMBER
    _interrupt_before_removal(november, tmp_path, monkeypatch)
    _execute(november, "UPDATE refresh SET state = 'answered' WHERE account_id = 'acct_later'")
    [archived] = _archive(november, tmp_path)
    assert archived.kept == {"changed lately": 1}
    assert [row["state"] for row in november.rows("SELECT state FROM refresh")] == ["answered"]


def test_undeliverable_outcome_counts_as_delivered_after_thirty_days(november: InProcessSystem, tmp_path: Path) -> None:
    """A funds hold keeps its payment until an operator ends it."""
    tasks = "SELECT task_id FROM outcome_delivery WHERE payment_id IN ('rejected', 'shared-1')"
    _execute(november, f"UPDATE outcome_delivery SET undeliverable = 'no callback' WHERE task_id IN ({tasks})")
    with transaction(november.engine) as tx:
        funds_holds.reopen_holds(tx, ["shared-1"])
    november.clock.now = AFTER_NOVEMBER
    [archived] = _archive(november, tmp_path)
    assert archived.kept == {"outcome undeliverable": 2}
    november.clock.now = AFTER_DECEMBER
    [archived] = _archive(november, tmp_path, DECEMBER.until)
    assert archived.kept == {"funds hold not ended": 1}
    assert archived.removed_payments == 1
    assert flow.end_hold(november.rt, "shared-1")
    november.clock.now = AFTER_JANUARY
    [archived] = _archive(november, tmp_path, JANUARY.until)
    assert not archived.kept
    assert set(_counts(november.engine).values()) == {0}


def test_outcome_that_is_given_up_after_the_copy_keeps_its_payment(
    november: InProcessSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_rejected = "WHERE payment_id = 'rejected'"
    _execute(november, f"UPDATE outcome_delivery SET due_at = delivered_at, delivered_at = NULL {of_rejected}")
    november.clock.now = AFTER_DECEMBER
    _interrupt_before_removal(november, tmp_path, monkeypatch)
    _execute(november, f"UPDATE outcome_delivery SET due_at = NULL, undeliverable = 'no callback' {of_rejected}")
    [archived] = _archive(november, tmp_path)
    assert archived.kept == {"outcome undeliverable": 1}


def test_verify_names_the_files_that_an_interrupted_archive_left(
    november: InProcessSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another folder was given the next time: nothing else would ever delete them."""
    november.clock.now = AFTER_NOVEMBER
    first, second = tmp_path / "first", tmp_path / "second"
    with monkeypatch.context() as patch:
        patch.setattr(archive_files, "write_manifest", _raise)
        with pytest.raises(KeyboardInterrupt):
            _archive(november, first)
    [error] = flow.verify_archive(november.engine, first)
    assert str(error) == (
        f"{first}/2026-11.partial is incomplete, and may have payment data; delete it, unless an archive command runs"
    )
    _archive(november, second)
    errors = [str(error) for error in flow.verify_archive(november.engine, first)]
    assert any(error.startswith(f"{first}/2026-11.partial is incomplete") for error in errors)
    assert [type(result) for result in flow.verify_archive(november.engine, second)] == [VerifiedMonth]


def test_verify_does_not_ask_to_delete_the_files_of_a_recorded_month(
    november: InProcessSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command was interrupted before it gave the folder its final name. It continues with these files."""
    november.clock.now = AFTER_NOVEMBER
    with monkeypatch.context() as patch:
        patch.setattr(archive_files, "name_partial_folder", _raise)
        with pytest.raises(KeyboardInterrupt):
            _archive(november, tmp_path)
    [error] = flow.verify_archive(november.engine, tmp_path)
    assert str(error) == f"the archive of 2026-11 in {tmp_path} was interrupted; give its command again"
    assert _archive(november, tmp_path)


INTERRUPTED = [
    (archiving, "statement_lines"),
    (archive_files, "write_manifest"),
    (archive_verification, "check_month"),
    (archived_months, "record_month"),
    (archive_files, "name_partial_folder"),
    (archive_removal, "delete_refreshes"),
    (archive_removal, "delete_applied_balances"),
    (archived_months, "mark_removed"),
]


@pytest.mark.parametrize(("module", "function"), INTERRUPTED, ids=[function for _, function in INTERRUPTED])
def test_interrupted_archive_continues(
    november: InProcessSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, function: str
) -> None:
    """No row is lost at any step: those in the ledger and those in the files are together all rows."""
    rows, statements = _counts(november.engine), _statements(november.engine)
    november.clock.now = AFTER_NOVEMBER
    monkeypatch.setattr(archiving, "ROWS_PER_STEP", 2)
    original, calls = getattr(module, function), 0

    def fail_at_second_call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 or function not in ("delete_refreshes", "delete_applied_balances"):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, function, fail_at_second_call)
    with pytest.raises(KeyboardInterrupt):
        _archive(november, tmp_path)
    monkeypatch.setattr(module, function, original)
    assert _statements(november.engine) == statements
    [archived] = _archive(november, tmp_path)
    assert archived.rows == rows
    assert set(_counts(november.engine).values()) == {0}
    assert _statements(november.engine) == statements
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["2026-11"]
    [verified] = flow.verify_archive(november.engine, tmp_path)
    assert isinstance(verified, VerifiedMonth)


def _flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _drop_row(path: Path) -> None:
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    path.write_bytes(gzip.compress(b"".join(lines[1:])))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a byte differs": _flip_byte,
    "a row is missing": _drop_row,
    "a file is missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_found_before_any_row_is_removed(
    november: InProcessSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """Verify reports it, restore inserts nothing, and an interrupted archive does not continue."""
    november.clock.now = AFTER_NOVEMBER
    _interrupt_before_removal(november, tmp_path, monkeypatch)
    before = _counts(november.engine)
    DAMAGES[damage](tmp_path / "2026-11" / "payment.jsonl.gz")
    with pytest.raises(ArchiveError, match=r"payment\.jsonl\.gz"):
        _archive(november, tmp_path)
    assert _counts(november.engine) == before
    [error] = flow.verify_archive(november.engine, tmp_path)
    assert isinstance(error, ArchiveError)
    with pytest.raises(ArchiveError, match=r"payment\.jsonl\.gz"):
        flow.restore_month(november.engine, tmp_path, "2026-11")


MANIFEST_DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "not UTF-8": (lambda _: b"\xff\xfe", r"2026-11/manifest\.json is damaged"),
    "no mapping": (lambda _: [], r"2026-11/manifest\.json is damaged"),
    "a later format": (lambda values: {**values, "format": 2}, r"2026-11/manifest\.json has the format 2"),
    "another month": (lambda values: {**values, "month": "2026-10"}, r"2026-11/manifest\.json is not that of 2026-11"),
    "a file is not listed": (
        lambda values: {**values, "files": {name: of for name, of in values["files"].items() if name != "balance"}},
        r"2026-11/manifest\.json is not that of 2026-11",
    ),
    "a later schema": (lambda values: {**values, "schema_revision": "9999"}, "schema revision 9999"),
}


@pytest.mark.parametrize("damage", MANIFEST_DAMAGES)
def test_month_with_another_manifest_is_not_restored(
    november: InProcessSystem, databases: Databases, tmp_path: Path, damage: str
) -> None:
    november.clock.now = AFTER_NOVEMBER
    _archive(november, tmp_path)
    manifest = tmp_path / "2026-11" / "manifest.json"
    change, message = MANIFEST_DAMAGES[damage]
    changed = change(json.loads(manifest.read_text()))
    manifest.write_bytes(changed if isinstance(changed, bytes) else json.dumps(changed).encode())
    with databases.create() as address:
        other = open_engine(address, connections=1)
        with pytest.raises(ArchiveError, match=message):
            flow.restore_month(other, tmp_path, "2026-11")
        assert set(_counts(other).values()) == {0}
        other.dispose()
    [error] = flow.verify_archive(november.engine, tmp_path)
    assert isinstance(error, ArchiveError)


def test_verify_finds_files_that_differ_from_the_statement(november: InProcessSystem, tmp_path: Path) -> None:
    """Even if their manifest was made anew."""
    november.clock.now = AFTER_NOVEMBER
    _archive(november, tmp_path)
    manifest = tmp_path / "2026-11" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["fees"]["USD"]["posted"] = "0.01"
    manifest.write_text(json.dumps(values))
    [error] = flow.verify_archive(november.engine, tmp_path)
    assert "is not the archive that the ledger knows" in str(error)
    (tmp_path / "2026-11").rename(tmp_path / "elsewhere")
    [error] = flow.verify_archive(november.engine, tmp_path)
    assert "2026-11 is missing" in str(error)


def test_archive_of_another_ledger_is_not_overwritten(november: InProcessSystem, tmp_path: Path) -> None:
    november.clock.now = AFTER_NOVEMBER
    (tmp_path / "2026-11").mkdir()
    with pytest.raises(ArchiveError, match="move the folder away"):
        _archive(november, tmp_path)


def test_second_archive_command_in_the_same_folder_is_refused(november: InProcessSystem, tmp_path: Path) -> None:
    november.clock.now = AFTER_NOVEMBER
    with (
        archive_files.locked_folder(tmp_path),
        pytest.raises(ArchiveError, match="another archive command uses"),
    ):
        _archive(november, tmp_path)
    assert _archive(november, tmp_path)


def test_second_archive_command_with_another_folder_is_refused(
    november: InProcessSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both copy the month. The first one to record it removes its rows; the other one leaves no copy behind."""
    rows, statements = _counts(november.engine), _statements(november.engine)
    november.clock.now = AFTER_NOVEMBER

    def archive_to_first_folder(*_: object) -> None:
        monkeypatch.undo()
        [archived] = _archive(november, tmp_path / "first")
        assert archived.rows == rows

    monkeypatch.setattr(archive_verification, "check_month", archive_to_first_folder)
    with pytest.raises(ArchiveError, match="another command has archived 2026-11 meanwhile"):
        _archive(november, tmp_path / "second")
    assert [path.name for path in (tmp_path / "second").iterdir()] == [".lock"]
    assert set(_counts(november.engine).values()) == {0}
    assert _statements(november.engine) == statements


PERMISSION = "INSERT INTO archive_removal (month) VALUES ('2026-11')"
ARCHIVED = (
    "INSERT INTO archived_month (month, since, until, copied_at, folder, manifest) VALUES ('2026-11', "
    "'2026-11-01 00:00:00.000000', '2026-12-01 00:00:00.000000', '2026-12-09 00:00:00.000000', '', '{}')"
)


@pytest.mark.parametrize(
    "statements",
    [[], [PERMISSION], [ARCHIVED], [ARCHIVED.replace("2026-11-01", "2026-11-23"), PERMISSION]],
    ids=["no permission", "the month is not archived", "not within an archive", "another month is archived"],
)
def test_database_rejects_a_delete_of_fee_entries_outside_of_an_archive(
    november: InProcessSystem, statements: list[str]
) -> None:
    before = _counts(november.engine)

    def delete_entries() -> None:
        with november.engine.begin() as connection:
            for statement in [*statements, "DELETE FROM fee_entry"]:
                connection.execute(text(statement))

    with pytest.raises(DBAPIError, match="fee_entry is append-only"):
        delete_entries()
    assert _counts(november.engine) == before


def test_invoice_of_an_archived_month_is_refused(november: InProcessSystem, tmp_path: Path) -> None:
    """Its calls are not in the ledger: all lines would be unmatched."""
    period = InvoicePeriod(since=NOVEMBER.since, until=NOVEMBER.until, tolerance=timedelta(0))
    data = b"account,day,fee\nacct_shared,2026-11-22,0.10\n"
    invoice = flow.parse_invoice_file("a.csv", data, ReadingOptions(), period, currency="USD", total=None)
    november.clock.now = AFTER_NOVEMBER
    assert len(flow.compare_invoice(november.engine, invoice).matched) == 1
    _archive(november, tmp_path)
    for use in (
        lambda: flow.compare_invoice(november.engine, invoice),
        lambda: flow.apply_invoice(november.engine, invoice, november.clock.now),
    ):
        with pytest.raises(InvoiceError, match="2026-11 is archived"):
            use()


def test_payments_continue_while_rows_are_removed(
    november: InProcessSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Payments of the same accounts are accepted, released and delivered between all steps of the removal."""
    monkeypatch.setattr(archiving, "ROWS_PER_STEP", 1)
    november.clock.now = AFTER_NOVEMBER
    pauses = 0

    def pay(_: float) -> None:
        nonlocal pauses
        pauses += 1
        november.initiate(f"during-{pauses}", "acct_shared", amount="1.00", hold_s=0)
        november.run_tasks()
        november.clock.advance(1)
        november.balance("acct_shared", "100.00")
        november.run_tasks()

    [archived] = flow.archive_months_before(november.engine, END_OF_NOVEMBER, tmp_path, clock=november.clock, pause=pay)
    assert archived.removed_payments == 10
    states = [row["state"] for row in november.rows("SELECT state FROM payment")]
    assert states == ["released"] * pauses
    assert pauses >= 9
