"""Invalid jobs and messages: rejected before a write or a call, without an effect on others."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.system import System, wait_until

Accounts = Callable[[str], str]

INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"amout": "25.00"}, 'amout: is not a field of a job (did you mean "amount"?)'),
    "malformed account id": ({"account_id": "12345"}, "account_id: must be a Quiltt account id"),
    "missing account id": ({"account_id": None}, "account_id: must be a Quiltt account id"),
    "empty payment id": (
        {"payment_id": ""},
        "payment_id: must be 1 to 128 printable ASCII characters without spaces",
    ),
    "long payment id": (
        {"payment_id": "p" * 129},
        "payment_id: must be 1 to 128 printable ASCII characters without spaces",
    ),
    "negative amount": ({"amount": "-25.00"}, "amount: must be a decimal in a string, greater than 0"),
    "zero amount": ({"amount": "0.00"}, "amount: must be a decimal in a string, greater than 0"),
    "too many decimal places": ({"amount": "25.001"}, "amount: must have at most 2 decimal places in USD"),
    "float amount": ({"amount": 25.0}, "amount: must be a decimal in a string"),
    "NaN amount": ({"amount": "NaN"}, "amount: must be a decimal in a string"),
    "other currency": (
        {"amount": "25.00", "currency": "EUR"},
        "currency: is EUR, but the currency of the accounts is USD",
    ),
    "zero timeout": ({"timeout_s": 0}, "timeout_s: must be a whole number of seconds from 1 to 3600"),
    "long timeout": ({"timeout_s": 3601}, "timeout_s: must be a whole number of seconds from 1 to 3600"),
    "text timeout": ({"timeout_s": "20"}, "timeout_s: must be a whole number of seconds from 1 to 3600"),
    "negative age": (
        {"max_balance_age_s": -1},
        "max_balance_age_s: must be a whole number of seconds from 0 to 86400",
    ),
    "funds check without an amount": ({"funds_check": "required"}, "amount: is missing, but a funds check needs it"),
    "unknown funds check": ({"funds_check": "maybe"}, 'funds_check: must be "required", "enabled" or "disabled"'),
    "large buffer": (
        {"amount": "1.00", "buffer": {"multiplier": "6"}},
        'buffer.multiplier: must be a decimal in a string, from "1" to "5"',
    ),
    "large metadata": (
        {"metadata": {"note": "n" * 5000}},
        "metadata: must not have more than 4096 bytes of JSON, but has 5012",
    ),
    "metadata without an object": ({"metadata": ["note"]}, "metadata: must be a JSON object"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_job_fails_with_its_field_and_leaves_no_trace(
    payready: System, account: Accounts, payment_id: str, name: str
) -> None:
    """The error names field and rule. Nothing is stored, no call is made, and `link_error` runs."""
    changes, message = INVALID[name]
    job = {"payment_id": payment_id, "account_id": account("prompt"), **changes}
    result = payready.service.send_task(
        "payments.initiate", kwargs=job, queue="payments", **payready.callbacks(payment_id)
    )
    with pytest.raises(Exception, match="^" + re.escape(message)) as raised:
        result.get(timeout=10)
    assert type(raised.value).__name__ == "InvalidJob"
    assert result.state == "FAILURE"
    wait_until(lambda: payment_id in payready.ended_payments(), 10, "link_error runs")
    (ended,) = payready.ended_payments()[payment_id]
    assert (ended["task"], ended["args"][0]) == ("ledger.not_ready", result.id)
    assert payready.rows("SELECT 1 FROM payment WHERE payment_id = :id", id=job["payment_id"]) == []
    assert payready.rows("SELECT 1 FROM outcome_delivery WHERE task_id = :id", id=result.id) == []
    assert payready.simulator.calls(str(job["account_id"])) == []


@pytest.mark.parametrize("callback", ["link", "link_error"])
def test_callback_that_can_never_be_sent_is_refused(
    payready: System, account: Accounts, payment_id: str, callback: str
) -> None:
    """The job fails, and its other errbacks run."""
    account_id = account("prompt")
    bad = payready.service.signature("ledger.record", queue="svc", countdown=1e300)
    options = payready.callbacks(payment_id)
    result = payready.initiate(payment_id, account_id, options={**options, callback: [options[callback], bad]})
    with pytest.raises(
        Exception, match=f'callback "ledger.record" .{callback}.: the option countdown must be'
    ) as raised:
        result.get(timeout=10)
    assert type(raised.value).__name__ == "InvalidJob"
    wait_until(lambda: payment_id in payready.ended_payments(), 10, "link_error runs")
    assert payready.ended_payments()[payment_id][0]["task"] == "ledger.not_ready"
    assert payready.simulator.calls(account_id) == []


def test_chain_with_an_argument_that_is_no_job_fails(payready: System) -> None:
    """A positional argument must be a job."""
    result = payready.service.send_task("payments.initiate", args=([1, 2],), queue="payments")
    with pytest.raises(Exception, match="must be a job, a mapping, not list") as raised:
        result.get(timeout=10)
    assert type(raised.value).__name__ == "InvalidJob"


@pytest.mark.parametrize("text", ["\x00", "\ud800", "𝔘nicode ✓", '"quoted\\'])
def test_outcome_has_the_exact_metadata_of_the_job(
    payready: System, account: Accounts, payment_id: str, text: str
) -> None:
    """Any JSON text is returned, also NUL and a lone surrogate."""
    result = payready.initiate(payment_id, account("prompt"), metadata={"note": text})
    assert result.get(timeout=10)["metadata"] == {"note": text}


@pytest.mark.parametrize(
    ("body", "content_type"), [(b"{no JSON", "application/json"), (b"\x80\x04K\x01.", "application/x-python-serialize")]
)
@pytest.mark.parametrize(("task", "queue"), [("payments.initiate", "payments"), ("balances.refresh", "refreshes")])
def test_unreadable_message_is_dropped_and_stops_no_worker(
    payready: System, account: Accounts, payment_id: str, body: bytes, content_type: str, task: str, queue: str
) -> None:
    """Celery acknowledges it, and the worker processes the next messages."""
    with payready.service.producer_or_acquire() as producer:
        headers = {"id": payment_id, "task": task, "lang": "py"}
        producer.publish(
            body, content_type=content_type, content_encoding="binary", headers=headers, routing_key=queue, exchange=""
        )
    assert payready.initiate(payment_id, account("prompt")).get(timeout=10)["state"] == "released"
    wait_until(lambda: not payready.unacknowledged(), 10, "nothing is left unacknowledged")
    for role in ("worker", "refresh"):
        assert Path(f"/proc/{payready.pids[role]}/cmdline").read_bytes()
