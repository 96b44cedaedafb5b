"""A ledger that looks like one of production: real payments with their copies over two weeks, and hostile values.

The real payments go through the roles. Their rows are copied with other ids and times, so that all columns agree.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Engine, insert, text

from tests.support.system import System, wait_until
from worker.ledger import dead_letters, quarantine
from worker.ledger.engine import transaction
from worker.ledger.tables import BALANCE, FEE_ENTRY, OUTCOME_DELIVERY, PAYMENT, REFRESH
from worker.quiltt.messages import UnparsedEvent
from worker.rules.unhandled_messages import DeadLetterReason, UnhandledMessage

RELEASED, INSUFFICIENT, CANCELLED = "order-20481-1", "payroll-2026-11-0317", "order-20541-1"
JOBS: Mapping[str, tuple[str, dict[str, Any]]] = {
    RELEASED: ("acct_prompt8Kq2Lw", {"amount": "149.00", "metadata": {"order": "20481", "customer": "C-1187"}}),
    "order-20481-2": ("acct_prompt8Kq2Lw", {"amount": "12.50", "max_balance_age_s": 3600}),
    "order-20490-1": ("acct_slow4Wd7Rt", {"amount": "80.00"}),
    "order-20490-2": ("acct_slow4Wd7Rt", {"amount": "19.99"}),
    "order-20497-1": ("acct_unsent2Fh6", {"amount": "64.10", "profile_id": "p_2Fh6", "timeout_s": 8}),
    "order-20499-1": ("acct_throttled5Bn", {"amount": "33.00"}),
    INSUFFICIENT: ("acct_poor5vX91Tq", {"amount": "2150.00", "metadata": {"run": "2026-11", "employee": "E-0317"}}),
    "invoice-88123": ("acct_nullavail7Bm", {"amount": "310.40"}),
    "order-20502-1": ("acct_gone4kP2Rs", {"amount": "25.00"}),
    "rent-2026-12-A14": ("acct_inactive3Mz", {"amount": "1180.00"}),
    "loan-5512-instalment-7": ("acct_badreq8Zc", {"amount": "402.77"}),
    "order-20511-1": ("acct_unauth6Yt", {"amount": "18.00"}),
    "order-20533-1": ("acct_silent1Qx", {"amount": "75.00", "timeout_s": 13}),
    "order-20540-1": ("acct_never2Wn", {"amount": "41.20", "timeout_s": 5}),
    CANCELLED: ("acct_never3We", {"amount": "99.00", "timeout_s": 900}),
}
"""Jobs by payment id. The account's name chooses what the simulator does."""
NOT_COPIED = ("order-20481-2", "order-20490-2")
"""They have the refresh of another payment, of which there is one copy."""
COPIES: Mapping[str, int] = {RELEASED: 900, "order-20490-1": 300, "order-20497-1": 25}
"""Copies of a payment's rows. Each other payment has `FEW_COPIES`."""
FEW_COPIES = 12

ATTACKS = (
    "<script>window.attacked=1;alert(1)</script>",
    '"><img src=x onerror="window.attacked=2">',
    "' onmouseover='window.attacked=3' autofocus onfocus='window.attacked=3' x='",
    "</title></style></textarea></svg><svg onload=window.attacked=4><foreignObject><b>bold",
    "{{7*7}}${7*7}{%raw%}#{7*7}",
    "\u202egnp.exe\u2066\u200f",
    "javascript:window.attacked=5//",
    "%3Cscript%3Ewindow.attacked=6%3C/script%3E%00%0d%0aSet-Cookie:a=b",
    "../../audit?x=1#y",
    "..",
    ".",
    "a/b//c/?&=#;,",
    "A" * 500,
    "W\u0336\u0351\u036b\u0317" * 60,
    "line\r\nSet-Cookie: b=c\n\nbreak\x1b[31m\x7f",
    "--> ]]> &lt;b&gt; &amp;#60; \\u003cscript\\u003e",
    '=HYPERLINK("http://127.0.0.1/")',
)
"""Values that an attacker could choose for an id, or for a key or value of metadata."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """A payment whose every text is a hostile value."""

    value: str
    is_waiting: bool


def attacks() -> Iterator[Attack]:
    """Return a payment for each hostile value. Every second one is waiting, the others have failed."""
    for number, value in enumerate(ATTACKS):
        yield Attack(value=value, is_waiting=number % 2 == 0)


def send_jobs_and_wait_until_resolved(system: System) -> None:
    """Send the jobs with callbacks, cancel one of them, and wait until all outcomes are delivered."""
    for payment_id, (account_id, job) in JOBS.items():
        options = {**system.callbacks(payment_id), "ignore_result": False}
        system.initiate(payment_id, account_id, **job, options=options)
    system.payment(CANCELLED)
    system.service.send_task("payments.cancel", (CANCELLED,), queue="payments")
    undelivered = "SELECT payment_id FROM outcome_delivery WHERE delivered_at IS NULL"
    wait_until(lambda: not system.rows(undelivered), 60, "the jobs are resolved")


def send_waiting_jobs(system: System, timeouts_s: range) -> None:
    """Send a job with each of these timeouts, whose webhook never arrives, and wait until they are waiting."""
    system.initiate_many(
        {
            "payment_id": f"order-{20600 + number}-1",
            "account_id": f"acct_never{number:04d}Ht",
            "amount": f"{20 + number * 37 % 900}.00",
            "timeout_s": timeout_s,
        }
        for number, timeout_s in enumerate(timeouts_s)
    )
    query = "SELECT 1 FROM payment WHERE payment_id LIKE 'order-206%'"
    wait_until(lambda: len(system.rows(query)) == len(timeouts_s), 60, "the jobs are accepted")


def copy_payments_over_two_weeks(engine: Engine) -> None:
    """Copy the rows of the real payments. The copies are of the last 14 days, most of them of the last hours."""
    copied = [payment_id for payment_id in JOBS if payment_id not in NOT_COPIED]
    counts = [COPIES.get(payment_id, FEW_COPIES) for payment_id in copied]
    with transaction(engine) as tx:
        tx.execute(text(COPY_PLAN), {"ids": copied, "counts": counts})
        for statement in COPY_STATEMENTS:
            tx.execute(text(statement))


COPY_PLAN = """CREATE TEMPORARY TABLE copy ON COMMIT DROP AS
    SELECT payment_id, refresh_id, n, power(random(), 4) * interval '14 days' ago,
        (0.6 - 1.9 * ln(1 - 0.999 * random())) * interval '1 second' latency
    FROM payment JOIN unnest(CAST(:ids AS text[]), CAST(:counts AS integer[])) AS plan (payment_id, copies)
        USING (payment_id), generate_series(1, copies) n"""
_COPY_ID = "substr(md5(copy.payment_id || n), 1, 8)"
_ACCOUNT = "'acct_' || substr(translate(md5(copy.payment_id || n || 'account'), '0189', 'KqTx'), 1, 12)"
COPY_STATEMENTS = (
    f"""INSERT INTO refresh (refresh_id, account_id, state, call_count, deferral_count, called_at, claimed_at,
        last_error)
    SELECT r.refresh_id || n, {_ACCOUNT}, state, call_count, deferral_count, called_at - ago, claimed_at - ago,
        last_error
    FROM copy JOIN refresh r USING (refresh_id)""",
    f"""INSERT INTO fee_entry (call_id, refresh_id, account_id, state, price, currency, price_list, evidence,
        called_at, recorded_at)
    SELECT call_id || n, refresh_id || n, {_ACCOUNT}, state, price, currency, price_list, evidence,
        called_at - ago, recorded_at - ago
    FROM copy JOIN fee_entry f USING (refresh_id)""",
    f"""INSERT INTO balance (balance_id, event_id, account_id, at, source, available, current, "limit", received_at,
        refresh_id, as_of, rejected)
    SELECT balance_id || n, event_id || n, {_ACCOUNT}, at - ago, source, available, current, "limit",
        coalesce(r.called_at, received_at) - ago + latency, refresh_id || n, as_of - ago, rejected
    FROM copy JOIN balance b USING (refresh_id) JOIN refresh r USING (refresh_id)""",
    f"""INSERT INTO payment (payment_id, account_id, state, job, profile_id, amount, requested_at, min_balance_at,
        deadline, due_at, resolved_at, reason, refresh_id, reused, balance_id, funds_calculation, outcome)
    SELECT 'pay_' || {_COPY_ID}, {_ACCOUNT}, state, job, profile_id, round(amount * (0.2 + n % 17 / 7.0), 2),
        requested_at - ago, min_balance_at - ago, deadline - ago, due_at - ago,
        CASE WHEN state = 'released' THEN requested_at + latency ELSE resolved_at END - ago, reason, p.refresh_id || n,
        reused, p.balance_id || n, funds_calculation, outcome
    FROM copy JOIN payment p USING (payment_id)""",
    f"""INSERT INTO outcome_delivery (task_id, payment_id, continuation, delivered_at)
    SELECT task_id || n, 'pay_' || {_COPY_ID}, continuation, delivered_at - ago
    FROM copy JOIN outcome_delivery d USING (payment_id)""",
)


def insert_unhandled_messages(engine: Engine, values: Iterable[str]) -> None:
    """Insert dead letters and quarantined events that contain the values."""
    now = datetime.now(UTC)
    messages, events = [], []
    for number, value in enumerate(values):
        reason = list(DeadLetterReason)[number % len(DeadLetterReason)]
        raw = value.encode("utf-8", "surrogatepass")
        messages.append(
            UnhandledMessage(queue="payments", reason=reason, detail=value, message=raw, task_id=value, task_name=value)
        )
        events.append(UnparsedEvent(raw=raw, reason=value))
    with transaction(engine) as tx:
        dead_letters.store(tx, messages, now)
        quarantine.insert_events(tx, events, now)


def insert_attacks(engine: Engine) -> None:
    """Insert a payment for each hostile value: its ids, metadata, errors and evidence are the value."""
    now = datetime.now(UTC)
    rows: dict[Any, list[dict[str, Any]]] = {}
    numbers = itertools.count()
    for attack in attacks():
        for table, row in _attack_rows(attack, now - timedelta(seconds=next(numbers))):
            rows.setdefault(table, []).append(row)
    with transaction(engine) as tx:
        for table, values in rows.items():
            tx.execute(insert(table), values)
    insert_unhandled_messages(engine, ATTACKS)


def _attack_rows(attack: Attack, at: datetime) -> Iterator[tuple[Any, dict[str, Any]]]:
    value, later = attack.value, at + timedelta(hours=1)
    yield (
        REFRESH,
        {
            "refresh_id": value,
            "account_id": value,
            "state": "accepted" if attack.is_waiting else "answered",
            "called_at": at,
            "claimed_at": at,
            "due_at": later if attack.is_waiting else None,
            "last_error": value,
        },
    )
    call = {"call_id": value, "refresh_id": value, "account_id": value, "price": 1, "currency": "USD"}
    yield (
        FEE_ENTRY,
        {**call, "state": "pending", "price_list": value, "evidence": {}, "called_at": at, "recorded_at": at},
    )
    if not attack.is_waiting:
        evidence = {value: value, "event": value, "balance": value}
        posted = {**call, "state": "posted", "price_list": value, "evidence": evidence}
        yield FEE_ENTRY, {**posted, "called_at": at, "recorded_at": at}
    yield (
        BALANCE,
        {
            "balance_id": value,
            "event_id": value,
            "account_id": value,
            "at": at,
            "source": value,
            "available": 1,
            "received_at": at,
            "refresh_id": value,
            "as_of": at,
            "rejected": "too_old",
        },
    )
    outcome = {"reason": "insufficient_funds", "detail": value}
    yield (
        PAYMENT,
        {
            "payment_id": value,
            "account_id": value,
            "state": "waiting" if attack.is_waiting else "failed",
            "job": {"metadata": {value: value, "nested": {value: [value, {value: None}]}}},
            "connection_id": value,
            "profile_id": value,
            "amount": 25,
            "requested_at": at,
            "min_balance_at": at,
            "deadline": later,
            "due_at": later,
            "refresh_id": value,
            "balance_id": None if attack.is_waiting else value,
            "resolved_at": None if attack.is_waiting else at,
            "reason": None if attack.is_waiting else outcome["reason"],
            "outcome": None if attack.is_waiting else outcome,
        },
    )
    signature = {
        "task": value,
        "args": [value],
        "kwargs": {value: value},
        "options": {"task_id": value, "queue": value},
    }
    yield (
        OUTCOME_DELIVERY,
        {
            "task_id": value,
            "payment_id": value,
            "continuation": {"version": 1, "task": value, "callbacks": [signature], "errbacks": [signature]},
            "delivered_at": None if attack.is_waiting else at,
            "undeliverable": None if attack.is_waiting else value,
        },
    )
