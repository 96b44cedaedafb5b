"""Jobs that violate their contract: rejected with the field's name, before payready stores anything or makes a call."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.system import System, wait_until

Accounts = Callable[[str], str]

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"amout": "25.00"}, "amout: Extra inputs are not permitted"),
    "a bad account id": ({"account_id": "12345"}, "account_id: String should match pattern"),
    "no account id": ({"account_id": None}, "account_id: Input should be a valid string"),
    "an empty payment id": ({"payment_id": ""}, "payment_id: String should have at least 1 character"),
    "a long payment id": ({"payment_id": "p" * 129}, "payment_id: String should have at most 128 characters"),
    "a negative amount": ({"amount": "-25.00"}, "amount: Input should be greater than 0"),
    "an amount of nothing": ({"amount": "0.00"}, "amount: Input should be greater than 0"),
    "an amount with too many places": ({"amount": "25.001"}, "amount: has more than the 2 decimal places of USD"),
    "an amount through a float": ({"amount": 25.0}, "amount: must be a decimal in a string"),
    "an amount that is no number": ({"amount": "NaN"}, "amount: must be a decimal in a string"),
    "a foreign currency": (
        {"amount": "25.00", "currency": "EUR"},
        "currency: is EUR, but the accounts",
    ),
    "no time": ({"timeout_s": 0}, "timeout_s: Input should be greater than or equal to 1"),
    "too much time": ({"timeout_s": 3601}, "timeout_s: Input should be less than or equal to 3600"),
    "time as text": ({"timeout_s": "20"}, "timeout_s: Input should be a valid integer"),
    "a negative age": ({"max_balance_age_s": -1}, "max_balance_age_s: Input should be greater than or equal to 0"),
    "a check of nothing": ({"funds_check": "required"}, "amount: is needed for a funds check"),
    "an unknown check": ({"funds_check": "maybe"}, "funds_check: Input should be 'required', 'enabled' or 'disabled'"),
    "a wild buffer": (
        {"amount": "1.00", "buffer": {"multiplier": "6"}},
        "buffer.multiplier: Input should be",
    ),
    "large metadata": ({"metadata": {"note": "n" * 5000}}, "metadata: is 501[0-9] bytes of JSON, more than 4096"),
    "metadata that is no object": ({"metadata": ["note"]}, "metadata: Input should be a valid dictionary"),
}


@pytest.mark.parametrize("what", BAD)
def test_invalid_job_fails_with_the_field_and_stores_nothing(
    payready: System, account: Accounts, payment_id: str, what: str
) -> None:
    """The error names field and rule. Nothing is stored, no call is made, and `link_error` runs."""
    wrong, complaint = BAD[what]
    job = {"payment_id": payment_id, "account_id": account("prompt"), **wrong}
    result = payready.service.send_task(
        "payments.initiate", kwargs=job, queue="payments", **payready.callbacks(payment_id)
    )
    with pytest.raises(Exception, match="^" + complaint.replace(".", r"\.")) as refusal:
        result.get(timeout=10)
    assert type(refusal.value).__name__ == "InvalidJob"
    assert result.state == "FAILURE"
    wait_until(lambda: payment_id in payready.ended_payments(), 10, "link_error runs")
    (callback,) = payready.ended_payments()[payment_id]
    assert (callback["task"], callback["args"][0]) == ("ledger.not_ready", result.id)
    assert payready.rows("SELECT 1 FROM payment WHERE payment_id = :id", id=job["payment_id"]) == []
    assert payready.rows("SELECT 1 FROM outcome_delivery WHERE task_id = :id", id=result.id) == []
    assert payready.simulator.calls(str(job["account_id"])) == []


def test_chain_result_that_is_no_job_raises_invalid_job(payready: System) -> None:
    """A positional argument must be a job."""
    result = payready.service.send_task("payments.initiate", args=([1, 2],), queue="payments")
    with pytest.raises(Exception, match="must be a job, a mapping, not list") as refusal:
        result.get(timeout=10)
    assert type(refusal.value).__name__ == "InvalidJob"


@pytest.mark.parametrize("text", ["\x00", "\ud800", "𝔘nicode ✓", '"quoted\\'])
def test_metadata_is_returned_unchanged(payready: System, account: Accounts, payment_id: str, text: str) -> None:
    """The outcome contains all values that JSON can encode."""
    result = payready.initiate(payment_id, account("prompt"), metadata={"note": text})
    assert result.get(timeout=10)["metadata"] == {"note": text}


@pytest.mark.parametrize(
    ("body", "content_type"), [(b"{no JSON", "application/json"), (b"\x80\x04K\x01.", "application/x-python-serialize")]
)
@pytest.mark.parametrize(("task", "queue"), [("payments.initiate", "payments"), ("balances.refresh", "refreshes")])
def test_unreadable_message_is_dropped_without_harm(
    payready: System, account: Accounts, payment_id: str, body: bytes, content_type: str, task: str, queue: str
) -> None:
    """Celery acknowledges it, and workers process the messages that follow."""
    with payready.service.producer_or_acquire() as producer:
        headers = {"id": payment_id, "task": task, "lang": "py"}
        producer.publish(
            body, content_type=content_type, content_encoding="binary", headers=headers, routing_key=queue, exchange=""
        )
    assert payready.initiate(payment_id, account("prompt")).get(timeout=10)["state"] == "released"
    wait_until(lambda: not payready.unacknowledged(), 10, "nothing is left unacknowledged")
    for role in ("worker", "refresh"):
        assert Path(f"/proc/{payready.pids[role]}/cmdline").read_bytes()
