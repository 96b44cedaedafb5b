"""Payments services with kombu's options that two Celery apps must agree on, through the real processes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord

from cli import celery_client
from config.celery_config import QUEUES
from config.settings import load_rejecting_unknown
from tests.support.system import SERVICE_QUEUE, eventually, system

pytestmark = pytest.mark.slow

PRIORITY = 5
"""With kombu's default steps it is in the list of priority 3."""
STEPS = {"PAYREADY_BROKER_PRIORITY_STEPS": "0,1,2,3,4,5,6,7,8,9"}
SEPARATOR = {"PAYREADY_BROKER_PRIORITY_SEPARATOR": ":"}
PREFIX = {"PAYREADY_BROKER_KEY_PREFIX": "svc:"}


def test_result_of_payment_has_key_prefix_of_service(tmp_path: Path) -> None:
    """A chord counts its payments under the same prefix."""
    url = f"sqlite:///{tmp_path}/payready.db"
    with system(tmp_path, url, PAYREADY_RESULT_KEY_PREFIX="svc:") as payready:
        payready.service.conf.result_backend_transport_options = {"global_keyprefix": "svc:"}
        payments = [
            payready.service.signature(
                "payments.initiate",
                kwargs={"payment_id": f"pay_{number}", "account_id": f"acct_prompt{number:06d}", "timeout_s": 20},
                options={"queue": "payments"},
            )
            for number in range(2)
        ]
        last = {"payment_id": "pay_last", "account_id": "acct_prompt000009", "timeout_s": 20}
        body = payready.service.signature(
            "payments.initiate", kwargs=last, options={"queue": "payments"}, immutable=True
        )
        assert chord(payments, body).apply_async().get(timeout=30)["payment_id"] == "pay_last"


@pytest.mark.parametrize(
    ("environ", "transport_options"),
    [
        pytest.param(STEPS, {"priority_steps": list(range(10))}, marks=pytest.mark.long),
        pytest.param(SEPARATOR, {"sep": ":"}, marks=pytest.mark.long),
        pytest.param(PREFIX, {"global_keyprefix": "svc:"}, marks=pytest.mark.long),
        ({**STEPS, **SEPARATOR, **PREFIX}, {"priority_steps": list(range(10)), "sep": ":", "global_keyprefix": "svc:"}),
    ],
    ids=["steps", "separator", "prefix", "all"],
)
def test_service_with_broker_options_is_served_and_called_back(
    tmp_path: Path, environ: Mapping[str, str], transport_options: Mapping[str, Any]
) -> None:
    """Jobs and callbacks have a priority, so the options decide their lists in both directions."""
    url = f"sqlite:///{tmp_path}/payready.db"
    with system(tmp_path, url, SERVICE_TRANSPORT_OPTIONS=json.dumps(transport_options), **environ) as payready:
        payready.start_service()
        settings = load_rejecting_unknown({"PAYREADY_REDIS_URL": payready.redis_url, **environ})
        read = {
            key
            for worker in celery_client.responding_workers(settings)
            for key in celery_client.lists_read(worker, settings.broker_key_prefix)
        }
        separator, prefix = transport_options.get("sep", "\x06\x16"), transport_options.get("global_keyprefix", "")
        step = PRIORITY if "priority_steps" in transport_options else 3
        assert {f"{prefix}{queue}{separator}{step}" for queue in (SERVICE_QUEUE, *QUEUES)} <= read

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
