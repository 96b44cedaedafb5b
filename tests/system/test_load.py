"""Many payments at once, through the real processes: waiting costs nothing, and every cent is accounted for."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import Postgres
from tests.support.system import System, system, wait_until

pytestmark = pytest.mark.slow


PATIENT = {
    "PAYREADY_UNCERTAIN_GRACE_S": "10",
    "PAYREADY_REFRESH_WINDOW_S": "60",
    "PAYREADY_QUILTT_CONNECT_TIMEOUT_S": "5",
    "PAYREADY_QUILTT_READ_TIMEOUT_S": "10",
}
"""With these an account needs one call: what was lost on the way has time to come, however busy the machine is."""
SHARES = {"mix": 80, "prompt": 10, "poor": 4, "badreq": 2, "nullavail": 2, "twice": 2}
"""Percent of the accounts by scenario."""
WITHOUT_CALL = ("badreq",)


@pytest.fixture
def crowded(request: pytest.FixtureRequest, tmp_path: Path, postgres_server: Postgres) -> Iterator[System]:
    """A system for one crowd, on the database that the test asks for."""
    url = postgres_server.database() if request.param == "postgresql" else f"sqlite:///{tmp_path}/payready.db"
    with system(tmp_path, url, **PATIENT) as running:
        running.start_service()
        yield running


def crowd(payments: int, accounts: int) -> list[dict[str, Any]]:
    """Payments over accounts of all kinds: half of them next to two of the same account, the others far apart."""
    kinds = [kind for kind, percent in SHARES.items() for _ in range(accounts * percent // 100)]
    spread = [n // 3 if n < payments // 2 else n % accounts for n in range(payments)]
    return [
        {
            "payment_id": f"pay_{number}",
            "account_id": f"acct_{kinds[account]}{account:06d}",
            "amount": "2.00",
            "timeout_s": 90,
            "max_balance_age_s": 3600,
        }
        for number, account in enumerate(spread)
    ]


@pytest.mark.parametrize(
    ("crowded", "payments", "accounts"),
    [("postgresql", 2000, 500), ("sqlite", 300, 100)],
    indirect=["crowded"],
    ids=["2000 on postgresql", "300 on sqlite"],
)
def test_each_of_many_payments_ends_once_and_each_call_is_paid_for_once(
    crowded: System, payments: int, accounts: int
) -> None:
    """One callback a payment, one accepted call an account, an entry for each call, and shares that add up."""
    jobs = crowd(payments, accounts)
    crowded.initiate_many(jobs, linked=True)
    wait_until(lambda: len(crowded.callbacks_received()) >= payments, 80, "all payments end")
    wait_until(
        lambda: crowded.rows("SELECT 1 FROM outcome_delivery WHERE due_at IS NOT NULL") == [], 10, "all is delivered"
    )

    heard = Counter(line["args"][1] for line in crowded.callbacks_received())
    assert heard == Counter(job["payment_id"] for job in jobs)
    released = {
        e["args"][1]: e["args"][0] for (e,) in crowded.ended_payments().values() if e["task"] == "ledger.execute_ach"
    }
    rows = {row["payment_id"]: row for row in crowded.rows("SELECT * FROM payment")}
    assert {i for i, row in rows.items() if row["state"] == "released"} == released.keys()
    kinds = {job["payment_id"]: job["account_id"].removeprefix("acct_").rstrip("0123456789") for job in jobs}
    assert {i for i, kind in kinds.items() if kind in ("mix", "prompt", "twice")} == released.keys()

    crowded.simulator.wait_for_webhooks()
    wait_until(lambda: crowded.rows("SELECT 1 FROM balance WHERE due_at IS NOT NULL") == [], 10, "all is applied")
    books = crowded.fee_totals()
    assert len(books) == accounts
    wrong = {a: kept for a, kept in books.items() if kept.accepted != kept.posted or kept.pending}
    assert wrong == {}
    called_too_often = {a: kept for a, kept in books.items() if kept.accepted > 1}
    assert called_too_often == {}
    assert_shares_add_up(crowded, rows, released)


def assert_shares_add_up(running: System, rows: dict[str, Any], released: dict[str, Any]) -> None:
    """The fee shares of the payments that share a call add up to its fee exactly."""
    prices: dict[str, Decimal] = defaultdict(Decimal)
    for row in running.rows("SELECT refresh_id, price FROM fee_entry WHERE state = 'posted'"):
        prices[row["refresh_id"]] += Decimal(row["price"])
    outcomes_by_refresh: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for payment_id, outcome in released.items():
        if outcome["fee"]["state"] != "reused":
            outcomes_by_refresh[rows[payment_id]["refresh_id"]].append(outcome)
    assert sum(len(outcomes) > 1 for outcomes in outcomes_by_refresh.values()) > 0, "no call was shared"
    for refresh_id, outcomes in outcomes_by_refresh.items():
        assert sum(Decimal(outcome["fee"]["amount"]) for outcome in outcomes) == prices[refresh_id]
        assert {outcome["shared_by"] for outcome in outcomes} == {len(outcomes)}


@pytest.mark.parametrize("crowded", ["postgresql"], indirect=True)
def test_waiting_payments_use_no_thread_connection_or_memory(crowded: System) -> None:
    """With 5,000 payments waiting, a worker of 16 threads settles a fresh one as if it were alone."""

    def wait_for_rows(count: int) -> None:
        waiting = "SELECT count(*) AS n FROM payment WHERE state = 'waiting'"
        wait_until(lambda: crowded.rows(waiting)[0]["n"] == count, 60, f"{count} payments wait")
        wait_until(lambda: crowded.queue_lengths() == {}, 10, "the queues are empty")

    def wait(first: int, count: int) -> None:
        crowded.initiate_many(
            {"payment_id": f"pay_{n}", "account_id": f"acct_never{n % 50:06d}", "timeout_s": 600}
            for n in range(first, first + count)
        )
        wait_for_rows(first + count)

    wait(0, 500)  # what a worker takes when it begins to work, it has taken
    before = crowded.footprint("worker")
    wait(500, 4500)
    after = crowded.footprint("worker")
    assert after.threads <= 16 + 4
    assert after.sockets <= 100, "more than its 16 threads can be using"
    assert after.memory_kib < before.memory_kib + 20_000, "some 5 KiB for each that waits"
    fresh = crowded.initiate("pay_fresh", "acct_prompt1", amount="25.00").get(timeout=10)
    assert fresh["waited_ms"] < 2000
