"""Jobs that break their contract: refused by name, before anything is stored or paid for."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.system import System, wait_until

Accounts = Callable[[str], str]

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"amout": "25.00"}, 'amout: is not a field of a job (did you mean "amount"?)'),
    "a bad account id": ({"account_id": "12345"}, "account_id: must be a Quiltt account id"),
    "no account id": ({"account_id": None}, "account_id: must be a Quiltt account id"),
    "an empty payment id": (
        {"payment_id": ""},
        "payment_id: must be 1 to 128 printable ASCII characters without spaces",
    ),
    "a long payment id": (
        {"payment_id": "p" * 129},
        "payment_id: must be 1 to 128 printable ASCII characters without spaces",
    ),
    "a negative amount": ({"amount": "-25.00"}, "amount: must be a decimal in a string, greater than 0"),
    "an amount of nothing": ({"amount": "0.00"}, "amount: must be a decimal in a string, greater than 0"),
    "an amount with too many places": ({"amount": "25.001"}, "amount: must have at most 2 decimal places in USD"),
    "an amount through a float": ({"amount": 25.0}, "amount: must be a decimal in a string"),
    "an amount that is no number": ({"amount": "NaN"}, "amount: must be a decimal in a string"),
    "a foreign currency": (
        {"amount": "25.00", "currency": "EUR"},
        "currency: is EUR, but the currency of the accounts is USD",
    ),
    "no time": ({"timeout_s": 0}, "timeout_s: must be a whole number of seconds from 1 to 3600"),
    "too much time": ({"timeout_s": 3601}, "timeout_s: must be a whole number of seconds from 1 to 3600"),
    "time as text": ({"timeout_s": "20"}, "timeout_s: must be a whole number of seconds from 1 to 3600"),
    "a negative age": (
        {"max_balance_age_s": -1},
        "max_balance_age_s: must be a whole number of seconds from 0 to 86400",
    ),
    "a check of nothing": ({"funds_check": "required"}, "amount: is missing, but a funds check needs it"),
    "an unknown check": ({"funds_check": "maybe"}, 'funds_check: must be "required", "enabled" or "disabled"'),
    "a wild buffer": (
        {"amount": "1.00", "buffer": {"multiplier": "6"}},
        'buffer.multiplier: must be a decimal in a string, from "1" to "5"',
    ),
    "large metadata": (
        {"metadata": {"note": "n" * 5000}},
        "metadata: must not have more than 4096 bytes of JSON, but has 5012",
    ),
    "metadata that is no object": ({"metadata": ["note"]}, "metadata: must be a JSON object"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_job_that_breaks_its_contract_fails_by_name_and_leaves_no_trace(
    payready: System, account: Accounts, payment_id: str, what: str
) -> None:
    """The error names field and rule; nothing is stored, no call is made, and `link_error` runs."""
    wrong, complaint = BAD[what]
    job = {"payment_id": payment_id, "account_id": account("prompt"), **wrong}
    result = payready.service.send_task(
        "payments.initiate", kwargs=job, queue="payments", **payready.callbacks(payment_id)
    )
    with pytest.raises(Exception, match="^" + re.escape(complaint)) as refusal:
        result.get(timeout=10)
    assert type(refusal.value).__name__ == "InvalidJob"
    assert result.state == "FAILURE"
    wait_until(lambda: payment_id in payready.ended_payments(), 10, "link_error runs")
    (ended,) = payready.ended_payments()[payment_id]
    assert (ended["task"], ended["args"][0]) == ("ledger.not_ready", result.id)
    assert payready.rows("SELECT 1 FROM payment WHERE payment_id = :id", id=job["payment_id"]) == []
    assert payready.rows("SELECT 1 FROM outcome_delivery WHERE task_id = :id", id=result.id) == []
    assert payready.simulator.calls(str(job["account_id"])) == []


def test_chain_with_an_argument_that_is_no_job_fails(payready: System) -> None:
    """What comes by position must be a job."""
    result = payready.service.send_task("payments.initiate", args=([1, 2],), queue="payments")
    with pytest.raises(Exception, match="must be a job, a mapping, not list") as refusal:
        result.get(timeout=10)
    assert type(refusal.value).__name__ == "InvalidJob"


@pytest.mark.parametrize("text", ["\x00", "\ud800", "𝔘nicode ✓", '"quoted\\'])
def test_metadata_comes_back_to_the_letter(payready: System, account: Accounts, payment_id: str, text: str) -> None:
    """Whatever JSON can say, however odd, is handed back with the outcome."""
    result = payready.initiate(payment_id, account("prompt"), metadata={"note": text})
    assert result.get(timeout=10)["metadata"] == {"note": text}


@pytest.mark.parametrize(
    ("body", "content_type"), [(b"{no JSON", "application/json"), (b"\x80\x04K\x01.", "application/x-python-serialize")]
)
@pytest.mark.parametrize(("task", "queue"), [("payments.initiate", "payments"), ("balances.refresh", "refreshes")])
def test_unreadable_message_is_dropped_and_harms_no_worker(
    payready: System, account: Accounts, payment_id: str, body: bytes, content_type: str, task: str, queue: str
) -> None:
    """It is acknowledged, as Celery does, and those that come with it are worked on."""
    with payready.service.producer_or_acquire() as producer:
        headers = {"id": payment_id, "task": task, "lang": "py"}
        producer.publish(
            body, content_type=content_type, content_encoding="binary", headers=headers, routing_key=queue, exchange=""
        )
    assert payready.initiate(payment_id, account("prompt")).get(timeout=10)["state"] == "released"
    wait_until(lambda: not payready.unacknowledged(), 10, "nothing is left unacknowledged")
    for role in ("worker", "refresh"):
        assert Path(f"/proc/{payready.pids[role]}/cmdline").read_bytes()
