"""A ledger with the payments of the last week, and payments that wait now."""

from sqlalchemy import Engine, text

from benchmarks import seed_data
from worker.ledger.engine import transaction

_PLAN = """CREATE TEMPORARY TABLE week ON COMMIT DROP AS
    SELECT n, n % 5 < 4 AS has_call, n / 5 * 5 + least(n % 5, 3) AS call, 'acct_' || n % 50000 AS account,
        now() - interval '7 days' * (1 - n::float8 / :payments) AS at,
        (0.4 - 1.6 * ln(1 - 0.9999 * random())) * interval '1 second' AS latency,
        CASE WHEN n % 100 < 94 THEN NULL ELSE (ARRAY['insufficient_funds', 'insufficient_funds', 'timeout',
            'connection_inactive', 'funds_unknown', 'provider_unavailable'])[n % 100 - 93] END AS reason
    FROM generate_series(0, CAST(:payments AS integer) - 1) n"""
_STATEMENTS = (
    """INSERT INTO refresh (refresh_id, account_id, state, call_count, deferral_count, called_at, claimed_at)
    SELECT 'ref_' || n, account, CASE WHEN reason IN ('timeout', 'provider_unavailable') THEN 'unanswered'
        WHEN reason = 'connection_inactive' THEN 'rejected' ELSE 'answered' END, 1, 0, at, at
    FROM week WHERE has_call""",
    """INSERT INTO fee_entry
    (call_id, refresh_id, account_id, state, price, currency, price_list, evidence, called_at, recorded_at)
    SELECT 'call_' || n, 'ref_' || n, account, state, 0.100000, 'USD', '2026-10', CASE WHEN state = 'pending'
        THEN '{"mode": "TEST"}'::json WHEN state = 'void' THEN '{"status": 403}'::json
        ELSE '{"status": 202}'::json END, at, at + interval '300 ms' * (state <> 'pending')::integer
    FROM week, unnest(CASE WHEN reason = 'provider_unavailable' THEN '{pending}'
        WHEN reason = 'connection_inactive' THEN '{pending,void}' ELSE '{pending,posted}' END::text[]) state
    WHERE has_call ORDER BY n""",
    """INSERT INTO balance (balance_id, event_id, account_id, at, source, available, current, received_at, refresh_id,
        as_of, rejected)
    SELECT 'bal_' || n, CASE WHEN n % 97 = 0 THEN 'poll:bal_' || n ELSE 'evt_' || n END, account, at, 'REFRESH', 500.0,
        512.34, at + latency, 'ref_' || n, at, CASE WHEN n % 499 = 0 THEN 'too_old' END
    FROM week WHERE has_call AND coalesce(reason, '') NOT IN ('timeout', 'provider_unavailable', 'connection_inactive')
    ORDER BY at + latency""",
    """INSERT INTO payment (payment_id, account_id, state, job, amount, requested_at, min_balance_at, deadline, due_at,
        resolved_at, reason, refresh_id, reused, balance_id, hold_until, outcome)
    SELECT 'pay_' || n, account, CASE WHEN reason IS NULL THEN 'released' ELSE 'failed' END,
        json_build_object('timeout_s', 120, 'metadata', json_build_object('order', 'A-' || n, 'customer', n % 9000)),
        n % 900 + 0.99, at, at - interval '30 s', at + interval '2 min', at + interval '5 s', at + latency, reason,
        'ref_' || call, NOT has_call, CASE WHEN reason IS NULL THEN 'bal_' || call END,
        CASE WHEN reason IS NULL THEN at + interval '1 day' END,
        CASE WHEN reason IS NULL THEN json_build_object(
            'balance', json_build_object('at', at, 'available', '500.0', 'current', '512.34'),
            'fee', json_build_object('amount', '0.100000', 'currency', 'USD'))
        ELSE json_build_object('payment_id', 'pay_' || n, 'reason', reason, 'detail', 'a detail for people') END
    FROM week ORDER BY n""",
    """INSERT INTO outcome_delivery (task_id, payment_id, continuation, delivered_at)
    SELECT md5('t' || n)::uuid::text, 'pay_' || n,
        json_build_object('reply_to', md5('c')::uuid, 'hostname', 'worker@host', 'suspended_at', 1796069291.5265455),
        at + latency + interval '20 ms' FROM week ORDER BY n""",
)
"""Four of five payments have a call of their own, the fifth reuses the balance of the fourth. 6 % fail."""
WAITING_UNTIL = """UPDATE payment SET deadline = now() + :longest * (0.01 + n), due_at = now() + :longest * (0.01 + n)
    FROM (SELECT payment_id, random() AS n FROM payment WHERE resolved_at IS NULL) waiting
    WHERE payment.payment_id = waiting.payment_id"""


def insert_week(engine: Engine, *, payments: int, waiting: int) -> None:
    """Insert resolved payments, evenly over the last seven days, and waiting ones with deadlines within an hour."""
    with transaction(engine) as tx:
        tx.execute(text("SET LOCAL statement_timeout = 0"))
        tx.execute(text(_PLAN), {"payments": payments})
        for statement in _STATEMENTS:
            tx.execute(text(statement))
    seed_data.insert_waiting(engine, waiting)
    with transaction(engine) as tx:
        tx.execute(text(WAITING_UNTIL.replace(":longest", "interval '1 hour'")))
    seed_data.vacuum(engine)
