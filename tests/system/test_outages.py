"""Broker restarts, an emptied Redis and killed processes: nothing is lost, repeated or charged twice."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path

import pytest

from tests.support.load_assertions import (
    assert_ledger_matches_provider,
    assert_one_outcome_each,
    have_outcomes,
    jobs,
)
from tests.support.servers import Postgres
from tests.support.system import ROLES, System, system, wait_until
from worker.ledger import fee_calls, fee_statement, invoices, payment_shares
from worker.ledger.engine import transaction
from worker.rules.invoice_lines import InvoiceLine, InvoicePeriod
from worker.rules.pricing import EntryState
from worker.rules.reconciliation import reconcile

pytestmark = pytest.mark.slow


SETTINGS = {"PAYREADY_VISIBILITY_TIMEOUT_S": "7", "PAYREADY_REFRESH_WINDOW_S": "60"}
"""A killed worker's messages are redelivered after 5 to 10 s. The window allows for the retries of webhooks."""

PRICE = Decimal("0.1")
"""Price of a call in the mode TEST."""


@pytest.fixture
def own_system(tmp_path: Path, postgres_server: Postgres) -> Iterator[System]:
    """Run a system with its own database for one test."""
    with system(tmp_path, postgres_server.database(), *ROLES, **SETTINGS) as running:
        running.start_service()
        yield running


def _are_accepted(system: System, count: int) -> bool:
    return bool(system.rows("SELECT count(*) AS n FROM payment")[0]["n"] >= count)


@pytest.mark.long
def test_repeated_broker_restarts_fail_no_job_of_busy_workers(own_system: System) -> None:
    """No worker exits, no job is lost, and every outcome is delivered."""
    restart_after = (50, 150, 250, 350)
    sent = jobs("prompt", 600, 100, timeout_s=60, max_balance_age_s=3600)
    own_system.initiate_many(sent, linked=True)
    for count in restart_after:
        wait_until(partial(_are_accepted, own_system, count), 40, f"{count} jobs are accepted")
        with own_system.valkey_unavailable():
            time.sleep(0.3)
    wait_until(have_outcomes(own_system, 600), 60, "all payments are resolved")
    assert_one_outcome_each(own_system, {str(job["payment_id"]) for job in sent})
    assert {line["task"] for line in own_system.callbacks_received()} == {"ledger.execute_ach"}
    assert_ledger_matches_provider(own_system, calls_per_account=1)


def test_redis_flush_loses_no_payment_and_causes_no_second_call(own_system: System) -> None:
    """Balances release waiting payments, and deadlines fail the others."""
    own_system.simulator.put("defaults", slow_s=4.0)
    waiting, expiring = jobs("slow", 20, 20, timeout_s=60), jobs("never", 20, 20, timeout_s=8)
    own_system.initiate_many(waiting + expiring, linked=True)
    wait_until(lambda: own_system.simulator.summary()["accepted"] >= 40, 10, "all calls are made")
    own_system.flush()
    later = [{**job, "payment_id": f"{job['payment_id']}again"} for job in waiting]
    own_system.initiate_many(later, linked=True)
    wait_until(have_outcomes(own_system, 60), 30, "all payments are resolved")
    assert_one_outcome_each(own_system, {str(job["payment_id"]) for job in waiting + expiring + later})
    failed = {
        payment_id for payment_id, (line,) in own_system.ended_payments().items() if line["task"] == "ledger.not_ready"
    }
    assert failed == {job["payment_id"] for job in expiring}
    assert_ledger_matches_provider(own_system, calls_per_account=1)


def test_killed_processes_lose_no_payment_and_no_call(own_system: System) -> None:
    """All roles are killed while payments wait, then two of them during a call. Each payment has one outcome.

    Each call is recorded, and the sum of the ledger equals that of the provider's log.
    """
    failing = [job for name in FAILURES for job in jobs(name, 6, 3, timeout_s=15)]
    sent = jobs("mix", 300, 100, timeout_s=60) + jobs("silent", 20, 10, timeout_s=15)
    own_system.initiate_many(sent[:150], linked=True)
    own_system.kill(*ROLES)
    own_system.start(*ROLES)
    own_system.initiate_many(sent[150:] + failing, linked=True)
    wait_until(lambda: count_unanswered_calls(own_system) > 0, 20, "a call waits for its response")
    for role in ("refresh", "worker"):
        own_system.kill(role)
        own_system.start(role)
    wait_until(have_outcomes(own_system, len(sent + failing)), 60, "all payments are resolved")
    assert_one_outcome_each(own_system, {str(job["payment_id"]) for job in sent + failing})
    assert_ledger_matches_provider(own_system, calls_per_account=2)
    assert_ledger_equals_provider_log(own_system)


FAILURES = ("lost", "twice", "early", "batch", "throttled", "error", "never", "poor", "gone", "inactive", "unsent")
"""Scenarios with lost responses, with repeated, late or missing events, and with rejections."""


def count_unanswered_calls(running: System) -> int:
    """Return the number of calls that the simulator has accepted and not responded to."""
    log = running.simulator.http.get("/control/log").raise_for_status().json()
    return sum(call["accepted"] and call["status"] is None for call in log["calls"])


def assert_ledger_equals_provider_log(running: System) -> None:
    """Apply the provider's log as an invoice, and assert that it equals the ledger.

    It charges every posted call, and no void or unknown one. Then the sums are equal.
    """
    log = running.simulator.http.get("/control/log").raise_for_status().json()
    charges = [
        InvoiceLine(
            row=call["seq"],
            number=str(call["seq"]),
            account_id=call["account_id"],
            since=at,
            until=at,
            amount=PRICE,
        )
        for call in log["calls"]
        if call["accepted"]
        for at in [datetime.fromtimestamp(call["started_at"], UTC)]
    ]
    now = datetime.now(UTC)
    period = InvoicePeriod(
        since=now - timedelta(hours=1), until=now + timedelta(hours=1), tolerance=timedelta(seconds=5)
    )
    with transaction(running.engine) as tx:
        calls = fee_calls.ledger_calls(tx, "USD", period.since, period.until)
        found = reconcile(charges, calls, period, (), currency="USD")
        assert (found.unmatched_lines, found.charged_though_void, found.price_differences) == ([], [], [])
        assert {call.state for call in found.unmatched_calls} <= {EntryState.PENDING}
        assert found.to_post, "no call was pending, so the faults had no effect"
        evidence = invoices.InvoiceEvidence(
            name="log", digest="", period="now", currency="USD", read_as={}, assumptions=()
        )
        invoices.apply_invoice_to_pending_calls(tx, found, evidence, now)
    with transaction(running.engine) as tx:
        (line,) = fee_statement.statement_lines(tx, period.since, period.until, "price")
        assert (line.posted_amount, line.pending) == (len(charges) * PRICE, 0)
        shares = list(payment_shares.payment_shares_and_unshared_fees(tx, period.since, period.until))
        assert sum(share.fee for share in shares) == line.posted_amount
