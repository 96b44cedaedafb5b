"""Seed data: a month of calls with the payments that they served, and waiting payments."""

from typing import IO

from sqlalchemy import Engine, text

from worker.ledger.engine import transaction

HISTORY_START = """CREATE TEMPORARY TABLE past ON COMMIT DROP AS
    SELECT n, timestamptz '2026-10-01 00:00:00+00' + n * interval '30 days' / :calls AS called_at
    FROM generate_series(CAST(:first AS integer), :calls - 1) n"""
FILL_STATEMENTS = (
    """INSERT INTO refresh (refresh_id, account_id, state, call_count, deferral_count, called_at, claimed_at)
    SELECT 'ref_past' || n, 'acct_past' || n % :accounts, 'answered', 1, 0, called_at, called_at FROM past""",
    """INSERT INTO fee_entry
    (call_id, refresh_id, account_id, state, price, currency, price_list, evidence, called_at, recorded_at)
    SELECT 'call_past' || md5(n::text), 'ref_past' || n, 'acct_past' || n % :accounts, state, 0.1, 'USD', '2026-10',
        '{"status": 202}', called_at, called_at + interval '1 second'
    FROM past, unnest(CASE WHEN n % 1000 = 0 THEN '{pending}' WHEN n % 50 = 0 THEN '{pending,void}'
        ELSE '{pending,posted}' END::text[]) state""",
    """INSERT INTO payment (payment_id, account_id, state, job, amount, requested_at, min_balance_at, deadline, due_at,
        resolved_at, refresh_id, reused, outcome)
    SELECT 'pay_past' || n || '_' || k, 'acct_past' || n % :accounts, 'released',
        jsonb_build_object('amount', '25.00', 'metadata', repeat('x', 100)), 25, called_at, called_at, called_at,
        called_at, called_at, 'ref_past' || n, k = 2,
        jsonb_build_object('verdict', 'sufficient', 'balance', repeat('x', 400))
    FROM past, generate_series(0, CASE WHEN n % 5 = 0 THEN 2 ELSE 0 END) k""",
)
"""One call in 50 is void and one in 1,000 pending. One in 5 serves three payments, the last of them later."""
WAITING_STATEMENTS = (
    """INSERT INTO refresh (refresh_id, account_id, state, call_count, deferral_count, called_at, claimed_at, due_at)
    SELECT 'ref_waiting' || n, 'acct_waiting' || n, 'accepted', 1, 0, now(), now(), now() + interval '1 hour'
    FROM generate_series(CAST(:first AS integer), :count - 1) n""",
    """INSERT INTO fee_entry
    (call_id, refresh_id, account_id, state, price, currency, price_list, evidence, called_at, recorded_at)
    SELECT 'call_' || md5(n::text), 'ref_waiting' || n, 'acct_waiting' || n, state, 0.1, 'USD', '2026-10',
        '{"status": 202}', now(), now()
    FROM generate_series(CAST(:first AS integer), :count - 1) n, unnest('{pending,posted}'::text[]) state""",
    """INSERT INTO payment
    (payment_id, account_id, state, job, amount, requested_at, min_balance_at, deadline, due_at, reused)
    SELECT 'pay_waiting' || n, 'acct_waiting' || n, 'waiting',
        jsonb_build_object('payment_id', 'pay_waiting' || n, 'account_id', 'acct_waiting' || n, 'amount', '25.00',
            'timeout_s', 3600),
        25, now(), now(), now() + interval '1 hour', now() + interval '1 hour', false
    FROM generate_series(CAST(:first AS integer), :count - 1) n""",
    """INSERT INTO outcome_delivery (task_id, payment_id, continuation)
    SELECT md5(n::text), 'pay_waiting' || n, jsonb_build_object('version', 1, 'id', md5(n::text), 'task',
        'payments.initiate', 'root_id', md5(n::text), 'hostname', 'worker@host', 'suspended_at', 1796000000.0)
    FROM generate_series(CAST(:first AS integer), :count - 1) n""",
)


def insert_history(engine: Engine, entries: int, *, first: int = 0) -> None:
    """Insert about `entries` fee entries with their refreshes and payments. The `first` calls must exist already."""
    calls = entries // 2
    with transaction(engine) as tx:
        tx.execute(text("SET LOCAL statement_timeout = 0"))
        tx.execute(text(HISTORY_START), {"first": first, "calls": calls})
        for statement in FILL_STATEMENTS:
            tx.execute(text(statement), {"accounts": max(1, calls // 20)})
    vacuum(engine)


def insert_calls_and_write_invoice(engine: Engine, calls: int, file: IO[str]) -> None:
    """Insert a month of calls with a fee entry each, and write the invoice that charges the posted and pending ones."""
    with transaction(engine) as tx:
        tx.execute(text("SET LOCAL statement_timeout = 0"))
        tx.execute(text(HISTORY_START), {"first": 0, "calls": calls})
        for statement in FILL_STATEMENTS[:2]:
            tx.execute(text(statement), {"accounts": max(1, calls // 20)})
    vacuum(engine)
    file.write("account_id,date,amount\n")
    with transaction(engine) as tx:
        tx.execute(text("SET LOCAL statement_timeout = 0"))
        rows = tx.execute(text(CHARGED_CALLS).execution_options(yield_per=10_000))
        file.writelines(f"{row.account_id},{row.called_at:%Y-%m-%dT%H:%M:%SZ},0.10\n" for row in rows)


CHARGED_CALLS = """SELECT account_id, called_at FROM fee_entry pending
    WHERE state = 'pending' AND account_id LIKE 'acct_past%' AND NOT EXISTS
    (SELECT FROM fee_entry void WHERE void.call_id = pending.call_id AND void.state = 'void') ORDER BY called_at"""
"""Without the calls that the benchmark's system made itself, which are not of that month."""


def insert_waiting(engine: Engine, count: int, *, first: int = 0) -> None:
    """Insert payments that wait for an hour, with their related rows. The `first` payments must exist already."""
    with transaction(engine) as tx:
        tx.execute(text("SET LOCAL statement_timeout = 0"))
        for statement in WAITING_STATEMENTS:
            tx.execute(text(statement), {"first": first, "count": count})
    vacuum(engine)


def vacuum(engine: Engine) -> None:
    """Vacuum and analyze all tables, as autovacuum would do later."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("SET statement_timeout = 0"))
        connection.execute(text("VACUUM ANALYZE"))
        connection.execute(text("RESET statement_timeout"))
