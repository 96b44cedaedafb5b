"""Many payments, and the assertions on their outcomes and fees after the faults of a test."""

from collections import defaultdict
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from tests.support.system import System


def jobs(scenario: str, count: int, accounts: int, **more: object) -> list[dict[str, object]]:
    """Return jobs spread over accounts of a scenario."""
    return [
        {"payment_id": f"pay_{scenario}{n}", "account_id": f"acct_{scenario}{n % accounts:06d}", **more}
        for n in range(count)
    ]


def have_outcomes(running: System, count: int) -> Callable[[], bool]:
    """Return a probe: whether at least `count` payments have an outcome at the service."""
    return lambda: len(running.ended_payments()) >= count


def assert_one_outcome_each(running: System, payment_ids: set[str]) -> None:
    """Assert that the service received one outcome per payment, under one task id, equal to the ledger."""
    outcomes = running.ended_payments()
    assert set(outcomes) == payment_ids
    assert {payment_id: len(lines) for payment_id, lines in outcomes.items() if len(lines) != 1} == {}
    states = {row["payment_id"]: row["state"] for row in running.rows("SELECT payment_id, state FROM payment")}
    callback_tasks = {payment_id: line["task"] for payment_id, (line,) in outcomes.items()}
    expected_task = {"released": "ledger.execute_ach", "failed": "ledger.not_ready"}
    assert {payment_id: expected_task[state] for payment_id, state in states.items()} == callback_tasks


def assert_ledger_matches_provider(running: System, *, calls_per_account: int) -> None:
    """Assert that the fee ledger matches the simulator's log and that no account was called too often."""
    totals = running.fee_totals()
    assert {account_id: total for account_id, total in totals.items() if not total.match} == {}
    assert max(total.accepted for total in totals.values()) <= calls_per_account


def assert_shares_add_up(running: System) -> None:
    """Assert that the shares of the payments of a refresh add up to its fees exactly, and that calls were shared."""
    prices: dict[str, Decimal] = defaultdict(Decimal)
    for row in running.rows("SELECT refresh_id, price FROM fee_entry WHERE state = 'posted'"):
        prices[row["refresh_id"]] += Decimal(row["price"])
    refreshes = {row["payment_id"]: row["refresh_id"] for row in running.rows("SELECT * FROM payment")}
    outcomes_by_refresh: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for payment_id, (line,) in running.ended_payments().items():
        if line["task"] == "ledger.execute_ach" and line["args"][0]["fee"]["state"] != "reused":
            outcomes_by_refresh[refreshes[payment_id]].append(line["args"][0])
    assert sum(len(outcomes) > 1 for outcomes in outcomes_by_refresh.values()) > 0, "no call was shared"
    for refresh_id, outcomes in outcomes_by_refresh.items():
        assert sum(Decimal(outcome["fee"]["amount"]) for outcome in outcomes) == prices[refresh_id]
        assert {outcome["shared_by"] for outcome in outcomes} == {len(outcomes)}
