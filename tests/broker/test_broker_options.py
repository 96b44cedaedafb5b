"""Payments services with kombu's options that two Celery apps must agree on, through the real processes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from celery import chain

from tests.support.system import SERVICE_QUEUE, eventually, system

PRIORITY = 5
"""With kombu's default steps it is in the list of priority 3."""
STEPS = {"PAYREADY_BROKER_PRIORITY_STEPS": "0,1,2,3,4,5,6,7,8,9"}
SEPARATOR = {"PAYREADY_BROKER_PRIORITY_SEPARATOR": ":"}
PREFIX = {
    "PAYREADY_BROKER_KEY_PREFIX": "svc:",
    "PAYREADY_BROKER_TRANSPORT": "kombu",  # the other transport knows no prefix
}


@pytest.mark.parametrize(
    ("environ", "transport_options"),
    [
        (STEPS, {"priority_steps": list(range(10))}),
        (SEPARATOR, {"sep": ":"}),
        (PREFIX, {"global_keyprefix": "svc:"}),
        ({**STEPS, **SEPARATOR, **PREFIX}, {"priority_steps": list(range(10)), "sep": ":", "global_keyprefix": "svc:"}),
    ],
    ids=["steps", "separator", "prefix", "all"],
)
def test_service_with_broker_options_is_served_and_called_back(
    tmp_path: Path, environ: Mapping[str, str], transport_options: Mapping[str, Any]
) -> None:
    """Jobs and callbacks have a priority, so the options decide their lists in both directions."""
    url = f"sqlite:///{tmp_path}/payready.db"
    with system(tmp_path, url, transport_options=transport_options, **environ) as payready:
        payready.start_service()
        sign, addressed = payready.service.signature, {"queue": SERVICE_QUEUE, "priority": PRIORITY}
        options = {
            "priority": PRIORITY,
            "link": sign("ledger.execute_ach", args=("pay_good",), options=addressed),
        }
        released = payready.initiate("pay_good", "acct_prompt000001", amount="25.00", options=options)
        options["link_error"] = sign("ledger.not_ready", args=("pay_poor",), options=addressed)
        payready.initiate("pay_poor", "acct_poor000001", amount="25.00", options=options)
        job = {"payment_id": "pay_chain", "account_id": "acct_prompt000002", "timeout_s": 20}
        chain(
            sign("ledger.prepare", kwargs=job, options=addressed),
            sign("payments.initiate", options={"queue": "payments", "priority": PRIORITY}),
            sign("ledger.record", options={**addressed, "priority": 9}),
        ).apply_async()

        assert released.get(timeout=20)["state"] == "released"
        expected = ["ledger.execute_ach", "ledger.not_ready", "ledger.prepare", "ledger.record"]
        eventually(lambda: len(payready.callbacks_received()) >= len(expected))
        assert sorted(line["task"] for line in payready.callbacks_received()) == expected
