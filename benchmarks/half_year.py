"""Measure that the ledger's files stay bounded: half a year of payments, with the updates that a payment makes."""
# ruff: noqa: S608 - the statements are made of constants of this module

import argparse
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, text

from benchmarks import seed_data
from tests.migrations_in_step import alembic
from tests.support.servers import Postgres
from worker.flow.archiving import archive_months_before
from worker.ledger.engine import open_engine, transaction

FIRST_DAY = datetime(2026, 1, 1, tzinfo=UTC)
DAYS = 180
ARCHIVE_ON_DAY_OF_MONTH = 10
"""Then all months before the previous one are archived: the ledger has 40 to 69 days."""
VACUUM_EVERY_DAYS = 5
"""Of a ledger of this age, PostgreSQL's autovacuum with its defaults (20 % of the rows are dead) is hardly rarer."""
PAYMENTS_PER_TRANSACTION = 1000

_NUMBERS = "generate_series(CAST(:first AS integer), CAST(:last AS integer)) n"
_REFRESH, _CALL = (
    "'ref_' || left(md5('r' || n), 24)",
    "'call_' || to_char(n, 'FM000000000000') || left(md5('c' || n), 12)",
)
_BALANCE = "'bal_' || left(md5('b' || n), 22)"
_ACCOUNT, _PAYMENT, _TASK = "'acct_' || n % 50000", "'pay_' || n", "md5('t' || n)::uuid::text"
_ENTRY = f"""INSERT INTO fee_entry
    (call_id, refresh_id, account_id, state, price, currency, price_list, evidence, called_at, recorded_at)
    SELECT {_CALL}, {_REFRESH}, {_ACCOUNT}"""
TRANSACTIONS: tuple[tuple[str, ...], ...] = (
    (  # intake, and the claim of the call
        f"""INSERT INTO payment (payment_id, account_id, state, job, amount, requested_at, min_balance_at, deadline,
        due_at, reused) SELECT {_PAYMENT}, {_ACCOUNT}, 'waiting', '{{}}', 25.00, :at, :at, :at + interval '2 min',
        :at + interval '5 s', false FROM {_NUMBERS}""",
        f"""INSERT INTO outcome_delivery (task_id, payment_id, continuation) SELECT {_TASK}, {_PAYMENT},
        json_build_object('reply_to', md5('c')::uuid, 'hostname', 'worker@host', 'suspended_at', 1796069291.5265455)
        FROM {_NUMBERS}""",
        f"""INSERT INTO refresh
        (refresh_id, account_id, state, call_count, deferral_count, called_at, claimed_at, due_at)
        SELECT {_REFRESH}, {_ACCOUNT}, 'calling', 1, 0, :at, :at, :at + interval '30 s'
        FROM {_NUMBERS}""",
        f"{_ENTRY}, 'pending', 0.100000, 'USD', '2026-01', '{{}}', :at, :at FROM {_NUMBERS}",
    ),
    (  # the call is accepted
        f"""UPDATE refresh SET state = 'accepted', due_at = :at + interval '1 min'
        WHERE refresh_id IN (SELECT {_REFRESH} FROM {_NUMBERS})""",
    ),
    (  # the balance arrives
        f"""{_ENTRY}, 'posted', 0.100000, 'USD', '2026-01', json_build_object(
            'event', 'evt_' || left(md5('e' || n), 22), 'balance', {_BALANCE}), :at, :at + interval '1 s'
        FROM {_NUMBERS}""",
        f"""INSERT INTO balance (balance_id, event_id, account_id, at, source, available, current, received_at,
        refresh_id, as_of) SELECT {_BALANCE}, 'evt_' || left(md5('e' || n), 22), {_ACCOUNT}, :at, 'REFRESH', 500.0,
        512.34, :at, {_REFRESH}, :at FROM {_NUMBERS}""",
        f"""UPDATE refresh SET state = 'answered', due_at = NULL
        WHERE refresh_id IN (SELECT {_REFRESH} FROM {_NUMBERS})""",
        f"""UPDATE payment SET state = 'released', resolved_at = :at + interval '1 s', hold_until = 'infinity',
        refresh_id = new.refresh_id, balance_id = new.balance_id, outcome = json_build_object(
            'balance', json_build_object('at', :at, 'available', '500.0', 'current', '512.34'),
            'fee', json_build_object('amount', '0.100000', 'currency', 'USD'))
        FROM (SELECT {_PAYMENT} AS id, {_REFRESH} AS refresh_id, {_BALANCE} AS balance_id FROM {_NUMBERS}) new
        WHERE payment_id = new.id""",
        f"""UPDATE outcome_delivery SET due_at = :at + interval '10 s'
        WHERE task_id IN (SELECT {_TASK} FROM {_NUMBERS})""",
    ),
    (  # the outcome is delivered
        f"""UPDATE payment SET hold_until = :at + interval '1 day'
        WHERE payment_id IN (SELECT {_PAYMENT} FROM {_NUMBERS})""",
        f"""UPDATE outcome_delivery SET due_at = NULL, delivered_at = :at + interval '1 s'
        WHERE task_id IN (SELECT {_TASK} FROM {_NUMBERS})""",
    ),
)
"""What the roles write for released payments, each with its own call, in the same transactions."""
_LEDGER_BYTES = """SELECT sum(pg_table_size(oid)) AS rows, sum(pg_indexes_size(oid)) AS indexes FROM pg_class
    WHERE relkind = 'r' AND relname IN ('payment', 'outcome_delivery', 'refresh', 'fee_entry', 'balance')"""


def measure(sizes: argparse.Namespace) -> dict[str, Any]:
    """Write half a year of payments, archive old months, and return the bytes of the ledger before each archive."""
    with tempfile.TemporaryDirectory(prefix="payready-bench-") as home, tempfile.TemporaryDirectory() as folder:
        server = Postgres(Path(home))
        try:
            url = server.database()
            alembic(url, "upgrade", "head")
            engine = open_engine(url, connections=2)
            measured = dict(_half_a_year(engine, sizes.payments, Path(folder)))
            engine.dispose()
        finally:
            server.stop()
    return measured


def _half_a_year(engine: Engine, payments: int, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for day in range(DAYS):
        today = FIRST_DAY + timedelta(days=day)
        _write_payments(engine, range(payments * day // DAYS, payments * (day + 1) // DAYS), today)
        if day % VACUUM_EVERY_DAYS == 0:
            seed_data.vacuum(engine)
        if today.day == ARCHIVE_ON_DAY_OF_MONTH:
            before = _ledger(engine)
            archive_s, archived = _archive(engine, today, folder)
            seed_data.vacuum(engine)
            measured = {**before, "archived_payments": archived, "archive_s": archive_s, "after": _ledger(engine)}
            yield str(today.date()), measured


def _write_payments(engine: Engine, numbers: range, today: datetime) -> None:
    for first in range(numbers.start, numbers.stop, PAYMENTS_PER_TRANSACTION):
        last = min(first + PAYMENTS_PER_TRANSACTION, numbers.stop) - 1
        at = today + (first - numbers.start) / len(numbers) * timedelta(hours=23)
        for statements in TRANSACTIONS:
            with transaction(engine) as tx:
                for statement in statements:
                    tx.execute(text(statement), {"first": first, "last": last, "at": at})


def _archive(engine: Engine, today: datetime, folder: Path) -> tuple[float, int]:
    """Archive all months before the previous one. Return the seconds, and how many payments were removed."""
    start = time.monotonic()
    until = (today.replace(day=1) - timedelta(days=1)).replace(day=1)
    months = list(archive_months_before(engine, until, folder, clock=lambda: today, pause=lambda _: None))
    return round(time.monotonic() - start, 1), sum(month.removed_payments for month in months)


def _ledger(engine: Engine) -> dict[str, Any]:
    with engine.connect() as connection:
        payments = connection.scalar(text("SELECT count(*) FROM payment")) or 0
        sizes = connection.execute(text(_LEDGER_BYTES)).one()
    mib = {"rows_mib": round(sizes.rows / 2**20), "indexes_mib": round(sizes.indexes / 2**20)}
    return {"payments": payments, **mib, "bytes_each": round((sizes.rows + sizes.indexes) / max(1, payments))}
