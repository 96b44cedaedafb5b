"""Many concurrent payments through the real processes: exact fees, and bounded resources."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.load_assertions import assert_shares_add_up
from tests.support.servers import Postgres
from tests.support.system import System, system, wait_until

pytestmark = pytest.mark.slow


LONG_TIMEOUTS = {
    "PAYREADY_UNCERTAIN_GRACE_S": "10",
    "PAYREADY_REFRESH_WINDOW_S": "60",
    "PAYREADY_QUILTT_CONNECT_TIMEOUT_S": "5",
    "PAYREADY_QUILTT_READ_TIMEOUT_S": "10",
}
"""With these an account needs one call, also on a busy machine."""
OTHER_THREADS = 8
"""Maximum number of a worker's threads outside of its pool: consumers, metrics, events. A busy pool has all its 16."""
SHARES = {"mix": 80, "prompt": 10, "poor": 4, "badreq": 2, "nullavail": 2, "twice": 2}
"""Percent of the accounts by scenario."""


@pytest.fixture
def load_system(request: pytest.FixtureRequest, tmp_path: Path, postgres_server: Postgres) -> Iterator[System]:
    """Run a system for one test, on the database of its parameter."""
    url = postgres_server.database() if request.param == "postgresql" else f"sqlite:///{tmp_path}/payready.db"
    with system(tmp_path, url, **LONG_TIMEOUTS) as running:
        running.start_service()
        yield running


def mixed_jobs(payments: int, accounts: int) -> list[dict[str, Any]]:
    """Return jobs for accounts of all scenarios. In the first half, three consecutive jobs have one account."""
    scenarios = [scenario for scenario, percent in SHARES.items() for _ in range(accounts * percent // 100)]
    spread = [n // 3 if n < payments // 2 else n % accounts for n in range(payments)]
    return [
        {
            "payment_id": f"pay_{number}",
            "account_id": f"acct_{scenarios[account]}{account:06d}",
            "amount": "2.00",
            "timeout_s": 90,
            "max_balance_age_s": 3600,
        }
        for number, account in enumerate(spread)
    ]


@pytest.mark.parametrize(
    ("load_system", "payments", "accounts"),
    [pytest.param("postgresql", 2000, 500, marks=[pytest.mark.long, pytest.mark.timeout(300)]), ("sqlite", 300, 100)],
    indirect=["load_system"],
    ids=["2000 on postgresql", "300 on sqlite"],
)
def test_each_of_many_payments_has_one_outcome_and_each_call_one_posted_fee(
    load_system: System, payments: int, accounts: int
) -> None:
    """One callback per payment, at most one accepted call per account, and fee shares that add up."""
    jobs = mixed_jobs(payments, accounts)
    load_system.initiate_many(jobs, linked=True)
    wait_until(lambda: len(load_system.callbacks_received()) >= payments, 80, "all payments are resolved")
    wait_until(
        lambda: load_system.rows("SELECT 1 FROM outcome_delivery WHERE due_at IS NOT NULL") == [],
        10,
        "all outcomes are delivered",
    )

    received = Counter(line["args"][1] for line in load_system.callbacks_received())
    assert received == Counter(job["payment_id"] for job in jobs)
    released = {
        e["args"][1]: e["args"][0]
        for (e,) in load_system.ended_payments().values()
        if e["task"] == "ledger.execute_ach"
    }
    rows = {row["payment_id"]: row for row in load_system.rows("SELECT * FROM payment")}
    assert {i for i, row in rows.items() if row["state"] == "released"} == released.keys()
    scenarios = {job["payment_id"]: job["account_id"].removeprefix("acct_").rstrip("0123456789") for job in jobs}
    assert {i for i, scenario in scenarios.items() if scenario in ("mix", "prompt", "twice")} == released.keys()

    load_system.simulator.wait_for_webhooks()
    wait_until(
        lambda: load_system.rows("SELECT 1 FROM balance WHERE due_at IS NOT NULL") == [], 10, "all balances are applied"
    )
    totals_by_account = load_system.fee_totals()
    assert len(totals_by_account) == accounts
    wrong = {a: totals for a, totals in totals_by_account.items() if totals.accepted != totals.posted or totals.pending}
    assert wrong == {}
    called_too_often = {a: totals for a, totals in totals_by_account.items() if totals.accepted > 1}
    assert called_too_often == {}
    assert_shares_add_up(load_system)


@pytest.mark.parametrize("load_system", ["postgresql"], indirect=True)
def test_waiting_payments_use_no_thread_connection_or_memory(load_system: System) -> None:
    """With 5,000 waiting payments, a worker with 16 threads resolves a new payment in less than 2 s."""

    def wait_until_waiting(count: int) -> None:
        waiting = "SELECT count(*) AS n FROM payment WHERE state = 'waiting'"
        wait_until(lambda: load_system.rows(waiting)[0]["n"] == count, 60, f"{count} payments are waiting")
        wait_until(lambda: load_system.queue_lengths() == {}, 10, "the queues are empty")

    def initiate_waiting(first: int, count: int) -> None:
        load_system.initiate_many(
            {"payment_id": f"pay_{n}", "account_id": f"acct_never{n % 50:06d}", "timeout_s": 600}
            for n in range(first, first + count)
        )
        wait_until_waiting(first + count)

    initiate_waiting(0, 500)  # `before` includes what a worker allocates at its start
    before = load_system.footprint("worker")
    initiate_waiting(500, 4500)
    after = load_system.footprint("worker")
    assert after.threads <= 16 + OTHER_THREADS
    assert after.sockets <= 100, "more than 16 threads use"
    assert after.memory_kib < before.memory_kib + 20_000, "about 5 KiB per waiting payment"
    outcome = load_system.initiate("pay_fresh", "acct_prompt1", amount="25.00").get(timeout=10)
    assert outcome["waited_ms"] < 2000
