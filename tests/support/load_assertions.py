"""Many payments, and the assertions on their outcomes and fees after the faults of a test."""

from collections.abc import Callable

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
