"""A crowd of payments, and what must hold of every one of them at the end, whatever broke meanwhile."""

from collections.abc import Callable

from tests.support.system import System


def jobs(scenario: str, count: int, accounts: int, **more: object) -> list[dict[str, object]]:
    """Payments spread over accounts of a scenario."""
    return [
        {"payment_id": f"pay_{scenario}{n}", "account_id": f"acct_{scenario}{n % accounts:06d}", **more}
        for n in range(count)
    ]


def wait_until_ended(running: System, count: int) -> Callable[[], bool]:
    """Whether as many payments have told the service their end."""
    return lambda: len(running.ended_payments()) >= count


def assert_one_outcome_each(running: System, payment_ids: set[str]) -> None:
    """Every payment told the service one end, under one task id, and the ledger agrees."""
    endings = running.ended_payments()
    assert set(endings) == payment_ids
    assert {payment_id: len(told) for payment_id, told in endings.items() if len(told) != 1} == {}
    states = {row["payment_id"]: row["state"] for row in running.rows("SELECT payment_id, state FROM payment")}
    told = {payment_id: line["task"] for payment_id, (line,) in endings.items()}
    word = {"released": "ledger.execute_ach", "failed": "ledger.not_ready"}
    assert {payment_id: word[state] for payment_id, state in states.items()} == told


def assert_ledger_matches_provider(running: System, *, calls_per_account: int) -> None:
    """The simulator's log and the fee ledger tell the same, and no account was called too often."""
    books = running.fee_totals()
    assert {account_id: kept for account_id, kept in books.items() if not kept.match} == {}
    assert max(kept.accepted for kept in books.values()) <= calls_per_account
