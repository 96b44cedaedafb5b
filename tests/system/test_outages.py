"""What payready runs on goes away, and its processes are killed: nothing is lost, nothing is done or paid twice."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path

import pytest

from tests.support.load_assertions import (
    assert_ledger_matches_provider,
    assert_one_outcome_each,
    jobs,
    wait_until_ended,
)
from tests.support.servers import Postgres
from tests.support.system import ROLES, System, system, wait_until
from worker.ledger import fee_calls, fee_statement, invoices
from worker.ledger.engine import transaction
from worker.rules.invoice_file import InvoiceLine, InvoicePeriod
from worker.rules.pricing import EntryState
from worker.rules.reconciliation import reconcile

pytestmark = pytest.mark.slow


Accounts = Callable[[str], str]
Run = Callable[..., AbstractContextManager[System]]

SETTINGS = {"PAYREADY_VISIBILITY_TIMEOUT_S": "7", "PAYREADY_REFRESH_WINDOW_S": "60"}
"""A killed worker's messages come back after 5 to 10 s; webhooks that are refused for a while do not cost a call."""

DIME = Decimal("0.1")
"""What a call costs in the mode TEST."""


@pytest.fixture
def breakable(tmp_path: Path, postgres_server: Postgres) -> Iterator[System]:
    """A system for one test, on a database of its own."""
    with system(tmp_path, postgres_server.database(), *ROLES, **SETTINGS) as running:
        running.start_service()
        yield running


def _are_accepted(system: System, count: int) -> bool:
    return bool(system.rows("SELECT count(*) AS n FROM payment")[0]["n"] >= count)


def test_busy_workers_survive_a_broker_that_stumbles_and_fail_no_job_for_it(breakable: System) -> None:
    """Redis restarts again and again: workers live on, no job is lost, and every outcome is delivered."""
    stumbles = (50, 150, 250, 350)
    crowd = jobs("prompt", 600, 100, timeout_s=60, max_balance_age_s=3600)
    breakable.initiate_many(crowd, linked=True)
    for count in stumbles:
        wait_until(partial(_are_accepted, breakable, count), 40, f"{count} jobs are accepted")
        with breakable.valkey_unavailable():
            time.sleep(0.3)
    wait_until(wait_until_ended(breakable, 600), 60, "all payments end")
    assert_one_outcome_each(breakable, {str(job["payment_id"]) for job in crowd})
    assert {line["task"] for line in breakable.callbacks_received()} == {"ledger.execute_ach"}
    assert_ledger_matches_provider(breakable, calls_per_account=1)


def test_payments_survive_a_broker_that_forgets_everything(breakable: System) -> None:
    """Events release who waited, deadlines fail the others, and no account with a call in flight is called again."""
    breakable.simulator.put("defaults", slow_s=4.0)
    waiting, hopeless = jobs("slow", 20, 20, timeout_s=60), jobs("never", 20, 20, timeout_s=8)
    breakable.initiate_many(waiting + hopeless, linked=True)
    wait_until(lambda: breakable.simulator.summary()["accepted"] >= 40, 10, "all calls are made")
    breakable.flush()
    later = [{**job, "payment_id": f"{job['payment_id']}again"} for job in waiting]
    breakable.initiate_many(later, linked=True)
    wait_until(wait_until_ended(breakable, 60), 30, "all payments end")
    assert_one_outcome_each(breakable, {str(job["payment_id"]) for job in waiting + hopeless + later})
    failed = {
        payment_id for payment_id, (line,) in breakable.ended_payments().items() if line["task"] == "ledger.not_ready"
    }
    assert failed == {job["payment_id"] for job in hopeless}
    assert_ledger_matches_provider(breakable, calls_per_account=1)


def test_killed_processes_leave_no_payment_behind_and_no_call_unaccounted_for(breakable: System) -> None:
    """All are killed while payments are under way, then some, one in its call: each payment ends once.

    Each call is booked, and the provider's log alone comes to the same sum as the ledger.
    """
    storm = [job for name in STORM for job in jobs(name, 6, 3, timeout_s=15)]
    crowd = jobs("mix", 300, 100, timeout_s=60) + jobs("silent", 20, 10, timeout_s=15)
    breakable.initiate_many(crowd[:150], linked=True)
    breakable.kill(*ROLES)
    breakable.start(*ROLES)
    breakable.initiate_many(crowd[150:] + storm, linked=True)
    wait_until(lambda: calls_on_the_wire(breakable) > 0, 20, "a call waits for its answer")
    for role in ("refresh", "worker"):
        breakable.kill(role)
        breakable.start(role)
    wait_until(wait_until_ended(breakable, len(crowd + storm)), 60, "all payments end")
    assert_one_outcome_each(breakable, {str(job["payment_id"]) for job in crowd + storm})
    assert_ledger_matches_provider(breakable, calls_per_account=2)
    assert_the_ledger_is_the_log(breakable)


STORM = ("lost", "twice", "early", "batch", "throttled", "error", "never", "poor", "gone", "inactive", "unsent")
"""Answers that are lost, events that are repeated, alone or gone, refusals of every kind."""


def calls_on_the_wire(running: System) -> int:
    """How many calls the simulator has accepted and not answered, just now."""
    log = running.simulator.http.get("/control/log").raise_for_status().json()
    return sum(call["accepted"] and call["status"] is None for call in log["calls"])


def assert_the_ledger_is_the_log(running: System) -> None:
    """The recount, from the provider's log alone.

    As an invoice it charges no call that is void or not known, and leaves out none that is posted; when it has settled
    what is pending, the ledger's sum is the log's, to the millionth.
    """
    log = running.simulator.http.get("/control/log").raise_for_status().json()
    charges = [
        InvoiceLine(
            row=call["seq"],
            number=str(call["seq"]),
            account_id=call["account_id"],
            since=at,
            until=at,
            amount=DIME,
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
        found = reconcile(charges, fee_calls.ledger_calls(tx, "USD", period.since, period.until), period)
        assert (found.unmatched_lines, found.charged_though_void, found.price_differences) == ([], [], [])
        assert {call.state for call in found.unmatched_calls} <= {EntryState.PENDING}
        assert found.to_post, "nothing was left open: this storm was none"
        evidence = invoices.InvoiceEvidence(name="log", digest="", period="now", currency="USD")
        invoices.apply_invoice_to_pending_calls(tx, found, evidence, now)
    with transaction(running.engine) as tx:
        (line,) = fee_statement.statement_lines(tx, period.since, period.until, "price")
        assert (line.posted_amount, line.pending) == (len(charges) * DIME, 0)
        shares = list(fee_statement.payment_shares_and_unshared_fees(tx, period.since, period.until))
        assert sum(share.fee for share in shares) == line.posted_amount
