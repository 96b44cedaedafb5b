"""Outages of 30 s of the database and the broker, while payments wait, webhooks arrive and jobs are sent.

The three outages run concurrently, each on its own system.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from kombu.exceptions import OperationalError
from redis import RedisError

from tests.support.load_assertions import (
    assert_ledger_matches_provider,
    assert_one_outcome_each,
    have_outcomes,
    jobs,
)
from tests.support.servers import Postgres, postgres
from tests.support.system import System, system, wait_until

OUTAGE_S, ACCOUNTS = 30, 20
DELIVERED_AFTER_S = 45
"""Time in which all outcomes must be delivered after the outage: Quiltt retries a webhook after half a minute."""
SETTINGS = {"PAYREADY_VISIBILITY_TIMEOUT_S": "7", "PAYREADY_REFRESH_WINDOW_S": "120"}
"""Messages are redelivered during the outage. The window is longer than the outage, so no second call is made."""

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]

Outage = Callable[[System, Postgres], AbstractContextManager[None]]
Check = Callable[[System], None]


def _assert_webhooks_are_rejected(running: System) -> None:
    """The status is 503, so that the provider retries them."""
    assert count_rejected_deliveries(running) >= ACCOUNTS


def _assert_balances_are_only_stored(running: System) -> None:
    """They are committed with a 2xx status. The sweep applies them after the outage."""
    assert running.rows("SELECT count(*) AS n FROM balance") == [{"n": ACCOUNTS}]
    assert count_rejected_deliveries(running) == 0
    assert running.rows("SELECT payment_id FROM payment WHERE state <> 'waiting'") == []


OUTAGES: dict[str, tuple[Outage, Check]] = {
    "the database is stopped": (lambda _, server: server.while_stopped(), _assert_webhooks_are_rejected),
    "the database is frozen": (lambda _, server: server.while_frozen(), lambda _: None),
    "the broker is stopped": (lambda running, _: running.valkey_unavailable(), _assert_balances_are_only_stored),
}
"""How each outage starts, and an assertion after 30 s of it."""


@pytest.fixture(scope="module")
def outages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, "Future[None]"]]:
    """Start all outages. Return their futures."""
    with ThreadPoolExecutor() as threads:
        yield {
            name: threads.submit(_run_outage, tmp_path_factory.mktemp("outage"), *outage)
            for name, outage in OUTAGES.items()
        }


def _run_outage(folder: Path, outage: Outage, check: Check) -> None:
    with postgres() as server, system(folder, server.database(), **SETTINGS) as running:
        running.start_service()
        running.simulator.put("defaults", slow_s=3.0)
        waiting, expiring = jobs("slow", 2 * ACCOUNTS, ACCOUNTS, timeout_s=100), jobs("never", 5, 5, timeout_s=15)
        sent_during_outage = jobs("prompt", 30, 15, timeout_s=100)
        running.initiate_many(waiting + expiring, linked=True)
        posted = (
            "SELECT count(*) AS n FROM fee_entry WHERE state = 'posted'"  # otherwise the result of a call is unknown
        )
        wait_until(lambda: running.rows(posted) == [{"n": ACCOUNTS + 5}], 15, "all calls are posted")
        with outage(running, server):
            unsent = _send_one_by_one(running, sent_during_outage, time.monotonic() + OUTAGE_S)
            check(running)
        running.initiate_many(unsent, linked=True)
        payment_ids = {str(job["payment_id"]) for job in waiting + expiring + sent_during_outage}
        wait_until(have_outcomes(running, len(payment_ids)), DELIVERED_AFTER_S, "all payments are resolved")
        assert_one_outcome_each(running, payment_ids)
        failed = {
            payment_id for payment_id, (line,) in running.ended_payments().items() if line["task"] == "ledger.not_ready"
        }
        assert failed == {job["payment_id"] for job in expiring}
        assert_ledger_matches_provider(running, calls_per_account=1)


def count_rejected_deliveries(running: System) -> int:
    """Return the number of webhook deliveries with status 503."""
    return int(running.simulator.summary()["deliveries_by_status"].get("503", 0))


def _send_one_by_one(running: System, jobs: list[dict[str, Any]], until: float) -> list[dict[str, Any]]:
    """Send jobs evenly until that time. Return the jobs that the broker did not accept."""
    unsent = []
    for count, job in enumerate(jobs):
        try:
            account_id = job["account_id"]
            options = {**running.callbacks(job["payment_id"]), "ignore_result": True}
            running.initiate(job["payment_id"], account_id, timeout_s=job["timeout_s"], options=options)
        except (OperationalError, RedisError, OSError):
            unsent.append(job)
        time.sleep(max(0.0, (until - time.monotonic()) / (len(jobs) - count)))
    return unsent


@pytest.mark.parametrize("outage", OUTAGES)
def test_outage_of_30_s_loses_no_payment_and_causes_no_second_call(
    outages: dict[str, "Future[None]"], outage: str
) -> None:
    """Each payment gets one outcome after the outage. Payments past their deadline fail."""
    outages[outage].result()
