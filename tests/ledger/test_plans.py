"""Frequent queries find their rows by an index, in a ledger with mostly old rows."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import insert, text

from tests.support.databases import Databases
from tests.support.in_process import START
from tests.support.statements import collected_statements
from worker.ledger import (
    accounts,
    balance_report,
    balances,
    cap_usage,
    fee_entries,
    fee_sharers,
    funds_holds,
    metrics_queries,
    now_report,
    outcome_deliveries,
    payments,
    provider_report,
    refreshes,
)
from worker.ledger.engine import Engine, Tx, open_engine, read_snapshot, transaction
from worker.ledger.locks import JobIds
from worker.ledger.outcome_deliveries import OutcomeDelivery
from worker.ledger.payments import Resolution
from worker.ledger.refreshes import RefreshRecord
from worker.ledger.tables import ACCOUNT, BALANCE, FEE_ENTRY, OUTCOME_DELIVERY, PAYMENT, REFRESH
from worker.rules.states import PaymentEvent, PaymentState, RefreshEvent, RefreshState

PAST, NOW, A = 4000, 40, "acct_7"
"""Number of resolved payments, number of waiting payments, and an account that has some of both."""


@pytest.fixture(scope="module")
def engine(databases: Databases) -> Iterator[Engine]:
    """Open a ledger with mostly resolved payments, all of them at the time of the last ANALYZE."""
    engine = open_engine(databases.new(), connections=10)
    with transaction(engine) as tx:
        _fill(tx, range(PAST))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    with transaction(engine) as tx:
        _fill(tx, range(PAST, PAST + NOW))
    yield engine
    engine.dispose()


def _fill(tx: Tx, numbers: range) -> None:
    resolved = {number: number < PAST for number in numbers}
    times = {number: START + timedelta(seconds=number) for number in numbers}
    tx.execute(
        insert(PAYMENT),
        [
            {
                "payment_id": f"p{n}",
                "account_id": f"acct_{n % 500}",
                "state": ("released" if n % 2 else "failed") if resolved[n] else "waiting",
                "job": {"payment_id": f"p{n}", "account_id": f"acct_{n % 500}"},
                "amount": Decimal(1),
                "requested_at": times[n],
                "min_balance_at": times[n],
                "deadline": times[n],
                "due_at": times[n],
                "resolved_at": times[n] if resolved[n] else None,
                "refresh_id": f"r{n // 2}" if resolved[n] else None,
                "reused": False,
                "outcome": {} if resolved[n] else None,
            }
            for n in numbers
        ],
    )
    tx.execute(
        insert(OUTCOME_DELIVERY),
        [
            {"task_id": f"t{n}", "payment_id": f"p{n}", "continuation": {}, "due_at": None if n % 400 else times[n]}
            for n in numbers
        ],
    )
    tx.execute(
        insert(REFRESH),
        [
            {
                "refresh_id": f"r{n}",
                "account_id": f"acct_{n % 500}",
                "state": "answered" if resolved[n] else ("accepted" if n % 2 else "requested"),
                "call_count": 1,
                "deferral_count": 0,
                "called_at": times[n],
                "due_at": None if resolved[n] else times[n],
            }
            for n in numbers
        ],
    )
    entries: list[dict[str, Any]] = [
        {
            "call_id": f"c{n}",
            "refresh_id": f"r{n}",
            "account_id": f"acct_{n % 500}",
            "state": state,
            "price": Decimal("0.1"),
            "currency": "USD",
            "price_list": "x",
            "evidence": {},
            "called_at": times[n],
            "recorded_at": times[n],
        }
        for n in numbers
        for state in (("pending", "posted") if resolved[n] else ("pending",))
    ]
    tx.execute(insert(FEE_ENTRY), entries)
    tx.execute(
        insert(BALANCE),
        [
            {
                "balance_id": f"b{n}",
                "event_id": f"e{n}",
                "source": "REFRESH",
                "account_id": f"acct_{n % 500}",
                "at": times[n],
                "received_at": times[n],
                "due_at": None if resolved[n] else times[n],
            }
            for n in numbers
        ],
    )
    tx.execute(
        insert(ACCOUNT),
        [{"account_id": f"acct_{n}", "kind": "DEPOSITORY", "currency": "USD", "read_at": times[n]} for n in numbers],
    )


END = START + timedelta(seconds=PAST + NOW)
IN_FLIGHT = RefreshRecord(
    refresh_id="r7", account_id=A, state=RefreshState.CALLING, call_count=1, called_at=START, claimed_at=START
)
REQUESTED = refreshes.new_refresh(A, f"r{PAST}", START)
FREQUENT_QUERIES: dict[str, tuple[Callable[[Tx], Any], set[str]]] = {
    "due payments": (lambda tx: payments.lock_due(tx, END, 500), {"payment_due_at"}),
    "waiting payments of an account": (lambda tx: payments.lock_waiting_by_account(tx, [A]), {"payment_waiting"}),
    "demand of an account": (lambda tx: payments.balance_time_bounds_of_waiting(tx, A), {"payment_waiting"}),
    "held amounts": (
        lambda tx: funds_holds.held_amounts_after(tx, [A], END - timedelta(seconds=900)),
        {"payment_hold"},
    ),
    "sharers of a refresh": (lambda tx: fee_sharers.count_fee_sharers_by_final_state(tx, ["r7"]), {"payment_sharers"}),
    "known payment by id": (
        lambda tx: payments.lock_payments_of_jobs(tx, [JobIds(account_id=A, payment_id="p7", task_id="t7")]),
        {"payment_pkey", "sqlite_autoindex_payment_1"},
    ),
    "payment of a registered task": (
        lambda tx: outcome_deliveries.payment_by_registered_task(tx, ["t7"]),
        {"outcome_delivery_pkey", "sqlite_autoindex_outcome_delivery_1"},
    ),
    "waiting payment by id": (
        lambda tx: payments.lock_waiting(tx, ["p7"]),
        {"payment_pkey", "sqlite_autoindex_payment_1"},
    ),
    "undelivered outcome of a task": (
        lambda tx: outcome_deliveries.claim_undelivered_and_unclaimed(tx, ["t7"], END),
        {"outcome_delivery_pkey", "sqlite_autoindex_outcome_delivery_1"},
    ),
    "tasks of the same payments": (
        lambda tx: funds_holds.start_hold_countdown(tx, {"t7": END}, 0),
        {"outcome_delivery_payment"},
    ),
    "overdue deliveries": (lambda tx: outcome_deliveries.claim_overdue(tx, END, 500), {"outcome_delivery_due_at"}),
    "refresh in flight": (lambda tx: refreshes.in_flight_refresh(tx, A), {"refresh_in_flight", "refresh_account"}),
    "requested refresh": (lambda tx: refreshes.requested_refresh(tx, A), {"refresh_requested", "refresh_account"}),
    "refreshes for a claim": (
        lambda tx: refreshes.find_in_flight_or_by_id(tx, [A], ["r7"]),
        {"refresh_pkey", "sqlite_autoindex_refresh_1", "refresh_in_flight", "refresh_account"},
    ),
    "refreshes awaiting a balance": (
        lambda tx: refreshes.find_answerable_or_requested(tx, [A], END - timedelta(hours=1)),
        {"refresh_account", "refresh_requested"},
    ),
    "newest balance of an account": (
        lambda tx: balances.newest_refresh_balance_by_account(tx, [A], END - timedelta(seconds=60)),
        {"balance_received"},
    ),
    "newest balance for a claim": (
        lambda tx: balances.newest_refresh_balance_for_waiting(tx, [A], timedelta(seconds=5)),
        {"balance_received"},
    ),
    "due refreshes": (lambda tx: refreshes.find_due_in_flight_or_unneeded(tx, END, 500), {"refresh_due_at"}),
    "refresh by id": (lambda tx: refreshes.find(tx, "r7"), {"refresh_pkey", "sqlite_autoindex_refresh_1"}),
    "rescheduled refreshes": (
        lambda tx: refreshes.reschedule_requested_skip_locked(tx, [REQUESTED], END),
        {"refresh_pkey", "sqlite_autoindex_refresh_1"},
    ),
    "calls of answerable refreshes": (
        lambda tx: fee_entries.calls_of_answerable_refreshes(tx, [A], END - timedelta(hours=1)),
        {"fee_entry_refresh"},
    ),
    "sharers of answerable refreshes": (
        lambda tx: fee_sharers.count_fee_sharers_of_answerable_refreshes(tx, [A], END - timedelta(hours=1)),
        {"payment_sharers"},
    ),
    "received balances and newer ones": (
        lambda tx: balances.find_or_received_since(tx, ["b7"], [A], END - timedelta(seconds=60)),
        {"balance_received"},
    ),
    "calls of a refresh": (lambda tx: fee_entries.calls_of_refreshes(tx, ["r7"]), {"fee_entry_refresh"}),
    "calls by id": (
        lambda tx: next(fee_entries.calls_in_batches(tx, ["c7"])),
        {"fee_entry_pending"},
    ),
    "fees of a day": (
        lambda tx: cap_usage.total_non_void_fees(tx, "USD", END - timedelta(seconds=60)),
        {"fee_entry_called_at"},
    ),
    "calls of an account": (
        lambda tx: cap_usage.count_non_void_calls(tx, A, END - timedelta(seconds=600)),
        {"fee_entry_account"},
    ),
    "facts of an account": (lambda tx: accounts.find(tx, [A]), {"account_pkey", "sqlite_autoindex_account_1"}),
    "balance by id": (lambda tx: balances.find(tx, ["b7"]), {"balance_pkey", "sqlite_autoindex_balance_1"}),
    "backlog": (metrics_queries.backlog, {"payment_due_at", "payment_waiting"}),
    "recently resolved payments": (
        lambda tx: metrics_queries.resolved_counts_by_state_and_reason(tx, END - timedelta(seconds=60), END),
        {"payment_resolved"},
    ),
    "recent fee entries": (
        lambda tx: metrics_queries.fee_entries_between(tx, END - timedelta(seconds=60), END),
        {"fee_entry_recorded_at"},
    ),
    "pending calls": (
        lambda tx: metrics_queries.pending_entries(tx, END - timedelta(seconds=60), END),
        {"fee_entry_recorded_at"},
    ),
    "rejected balances": (
        lambda tx: balance_report.rejected_counts(tx, END - timedelta(hours=3)),
        {"balance_rejected"},
    ),
    "most urgent waiting payments": (
        lambda tx: now_report.first_waiting_by_deadline(tx, 300),
        {"payment_due_at", "payment_waiting"},
    ),
    "waiting payments by time left": (
        lambda tx: now_report.waiting_counts_by_deadline(tx, [END, END + timedelta(seconds=60)]),
        {"payment_due_at", "payment_waiting"},
    ),
    "first call": (now_report.first_call_at, {"fee_entry_called_at"}),
    "a step of pending calls": (
        lambda tx: now_report.pending_calls_of_next_step(tx, END - timedelta(seconds=60), END),
        {"fee_entry_called_at"},
    ),
    "finished calls": (lambda tx: now_report.final_call_ids(tx, ["c7"]), {"fee_entry_final"}),
    "sampled calls": (
        lambda tx: provider_report.sample_calls(tx, END - timedelta(seconds=20), END),
        {"fee_entry_pkey", "balance_received"},
    ),
    "due balances": (lambda tx: balances.claim_overdue_unapplied(tx, END, 500), {"balance_due_at"}),
}


@pytest.mark.parametrize("name", FREQUENT_QUERIES)
def test_frequent_query_uses_its_index(engine: Engine, name: str) -> None:
    """Its plan has one of the expected indexes and no sequential scan, except of the found rows (`overdue`)."""
    query, indexes = FREQUENT_QUERIES[name]
    plans = _plans(engine, query, explained=read_snapshot(engine))
    assert any(re.search(rf"\b{index}\b", plan) for plan in plans for index in indexes), plans
    for plan in plans:
        assert not re.search(r"Seq Scan|^SCAN (?!overdue$)\w+$", plan, re.MULTILINE), plan


UPDATES: dict[str, Callable[[Tx], Any]] = {
    "delayed": lambda tx: refreshes.delay_if_unchanged(tx, REQUESTED, END, None),
    "deferred": lambda tx: refreshes.defer_if_unchanged(tx, REQUESTED, END, "no connection"),
    "claimed": lambda tx: refreshes.transition(tx, REQUESTED, RefreshEvent.CLAIM, END),
    "rescheduled": lambda tx: refreshes.reschedule_if_unchanged(tx, IN_FLIGHT, END),
    "result lost": lambda tx: refreshes.transition(tx, IN_FLIGHT, RefreshEvent.RESULT_LOST, END),
}


@pytest.mark.parametrize("name", UPDATES)
def test_refresh_is_updated_by_primary_key(engine: Engine, name: str) -> None:
    """Not by an index of all requested or in-flight refreshes: they are many when calls are delayed."""
    [plan] = _plans(engine, UPDATES[name], "UPDATE", explained=transaction(engine))
    assert re.search(r"refresh_pkey|sqlite_autoindex_refresh_1", plan), plan


NEXT_CHECKS = {f"p{PAST + number}": END for number in range(NOW)}
CLAIMED = OutcomeDelivery(task_id="t7", continuation={}, state=PaymentState.FAILED, outcome={}, claimed_until=END)
BATCH_UPDATES: dict[str, tuple[Callable[[Tx], Any], str]] = {
    "next checks": (lambda tx: payments.set_next_checks_of_locked(tx, NEXT_CHECKS), "payment_pkey"),
    "deliveries": (lambda tx: outcome_deliveries.mark_delivered(tx, {"t7": END}), "outcome_delivery_pkey"),
    "claims of deliveries": (
        lambda tx: outcome_deliveries.renew_claims(tx, [CLAIMED], END),
        "outcome_delivery_pkey",
    ),
    "refreshes": (
        lambda tx: refreshes.transition_all_and_clear_errors(tx, RefreshEvent.ACCEPT, [(IN_FLIGHT, END)]),
        "refresh_pkey",
    ),
    "balances": (
        lambda tx: balances.mark_applied_with_refresh(tx, list(balances.find(tx, ["b7"]).result().values())),
        "balance_pkey",
    ),
}


@pytest.mark.parametrize("name", BATCH_UPDATES)
def test_rows_of_batch_are_updated_by_primary_key(engine: Engine, name: str) -> None:
    """Neither by an index of all waiting rows nor by a scan: the plan stays when the table has grown."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite updates them one by one")
    write, key = BATCH_UPDATES[name]
    [plan, *_] = _plans(engine, write, "UPDATE", explained=transaction(engine))
    assert "Hash" not in plan
    assert set(re.findall(r"Scan using (\w+)|Scan on (\w+_\w+)", plan)) == {(key, ""), ("", "json_to_recordset")}, plan


def test_resolution_finds_payments_by_primary_key_and_their_deliveries_by_payment(engine: Engine) -> None:
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite updates them one by one")
    resolutions = [
        Resolution(payment_id=payment_id, event=PaymentEvent.EXPIRED, outcome={}, resolved_at=END)
        for payment_id in NEXT_CHECKS
    ]
    [plan] = _plans(
        engine, lambda tx: payments.resolve(tx, resolutions, END), "WITH updated", explained=transaction(engine)
    )
    assert "Hash" not in plan
    assert set(re.findall(r"(?:Index Scan using|Index Scan on|Scan on) (\w+)", plan)) == {
        "payment_pkey",
        "json_to_recordset",
        "outcome_delivery_payment",
        "updated",
    }, plan


def _plans(
    engine: Engine,
    run: Callable[[Tx], Any],
    kind: str | tuple[str, ...] = ("SELECT", "WITH"),
    *,
    explained: AbstractContextManager[Tx],
) -> list[str]:
    """Return the plans of the statements of this kind that `run` executes. `explained` opens the session to plan in."""
    with collected_statements(engine) as statements, engine.connect() as connection, Tx.commit_at_end(connection) as tx:
        run(tx)
        tx.execute(text("ROLLBACK"))  # after the statements whose replies are not needed
    explain = "EXPLAIN " if engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN "
    with explained as tx:
        return [
            "\n".join(str(row[-1]) for row in tx.connection_after_queue().exec_driver_sql(explain + sql, given))
            for sql, given in statements
            if sql.startswith(kind)
        ]
