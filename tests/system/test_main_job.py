"""The job and its outcome, as the payments service sees them, through the real processes."""

from collections.abc import Callable

import pytest

from tests.support.system import System

Accounts = Callable[[str], str]


def test_payment_is_released_by_the_balance_of_its_call(payready: System, account: Accounts, payment_id: str) -> None:
    """The outcome states the balance, the waiting time and the fee."""
    account_id = account("prompt")
    outcome = payready.initiate(payment_id, account_id, amount="25.00", metadata={"order": 7}).get(timeout=20)
    assert outcome["state"] == "released"
    assert outcome["verdict"] == "sufficient"
    assert outcome["balance"]["available"] == "500.0"
    assert outcome["fee"] == {"amount": "0.100000", "currency": "USD", "state": "posted"}
    assert outcome["shared_by"] == 1
    assert outcome["metadata"] == {"order": 7}
    assert [call["accepted"] for call in payready.simulator.calls(account_id)] == [True]


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ("badreq", "account_unsupported"),
        ("unauth", "not_authorized"),
        ("inactive", "connection_inactive"),
        ("gone", "account_not_found"),
        ("poor", "insufficient_funds"),
        ("nullavail", "funds_unknown"),
    ],
)
def test_rejected_call_or_uncovered_amount_fails_payment_at_once(
    payready: System, account: Accounts, payment_id: str, scenario: str, reason: str
) -> None:
    """The payment does not wait for its deadline."""
    result = payready.initiate(payment_id, account(scenario), amount="25.00", timeout_s=60)
    with pytest.raises(Exception, match=reason) as raised:
        result.get(timeout=15)
    assert type(raised.value).__name__ == "PaymentNotReady"


def test_lost_connection_fails_its_payment_at_once(payready: System, account: Accounts, payment_id: str) -> None:
    """The payment does not wait for its deadline, because the user must reconnect."""
    result = payready.initiate(payment_id, account("never"), amount="25.00", timeout_s=60, connection_id="conn_lost1")
    payready.payment(payment_id)
    event = {"type": "connection.synced.errored.repairable", "record": {"id": "conn_lost1", "status": "ERROR"}}
    response = payready.simulator.http.post("/control/deliver", json={"body": {"events": [event]}}).raise_for_status()
    assert response.json()["status"] == 204
    with pytest.raises(Exception, match=r"connection_lost.*repairable"):
        result.get(timeout=15)
