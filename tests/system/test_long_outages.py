"""What payready stands on is away for half a minute, while payments wait, webhooks arrive and jobs are sent.

Most of that is waiting, so the three outages happen side by side, each to a system of its own.
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
    jobs,
    wait_until_ended,
)
from tests.support.servers import Postgres, postgres
from tests.support.system import System, system, wait_until

AWAY_S, ACCOUNTS = 30, 20
DELIVERED_AFTER_S = 45
"""Time in which all outcomes must be delivered after the outage: Quiltt retries a webhook after half a minute."""
SETTINGS = {"PAYREADY_VISIBILITY_TIMEOUT_S": "7", "PAYREADY_REFRESH_WINDOW_S": "120"}
"""Messages come back while the outage lasts; a webhook that is refused for so long does not cost a call."""

pytestmark = pytest.mark.timeout(240)

Away = Callable[[System, Postgres], AbstractContextManager[None]]
Check = Callable[[System], None]


def _webhooks_are_refused(running: System) -> None:
    """With 503, so that they come again."""
    assert refused(running) >= ACCOUNTS


def _balances_are_kept_only(running: System) -> None:
    """They are committed, and the sender got a 2xx; the sweep applies them."""
    assert running.rows("SELECT count(*) AS n FROM balance") == [{"n": ACCOUNTS}]
    assert refused(running) == 0
    assert running.rows("SELECT payment_id FROM payment WHERE state <> 'waiting'") == []


OUTAGES: dict[str, tuple[Away, Check]] = {
    "the database is stopped": (lambda _, server: server.while_stopped(), _webhooks_are_refused),
    "the database is frozen": (lambda _, server: server.while_frozen(), lambda _: None),
    "the broker is stopped": (lambda running, _: running.valkey_unavailable(), _balances_are_kept_only),
}
"""How each outage starts, and what must be true after half a minute of it."""


@pytest.fixture(scope="module")
def outages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, "Future[None]"]]:
    """All of them, under way."""
    with ThreadPoolExecutor() as threads:
        yield {
            name: threads.submit(_outage, tmp_path_factory.mktemp("away"), *outage) for name, outage in OUTAGES.items()
        }


def _outage(folder: Path, away: Away, check: Check) -> None:
    with postgres() as server, system(folder, server.database(), **SETTINGS) as running:
        running.start_service()
        running.simulator.put("defaults", slow_s=3.0)
        waiting, hopeless = jobs("slow", 2 * ACCOUNTS, ACCOUNTS, timeout_s=100), jobs("never", 5, 5, timeout_s=15)
        meanwhile = jobs("prompt", 30, 15, timeout_s=100)
        running.initiate_many(waiting + hopeless, linked=True)
        booked = (
            "SELECT count(*) AS n FROM fee_entry WHERE state = 'posted'"  # otherwise the result of a call is unknown
        )
        wait_until(lambda: running.rows(booked) == [{"n": ACCOUNTS + 5}], 15, "all calls are made, and booked")
        with away(running, server):
            unsent = _send_one_by_one(running, meanwhile, time.monotonic() + AWAY_S)
            check(running)
        running.initiate_many(unsent, linked=True)
        everyone = {str(job["payment_id"]) for job in waiting + hopeless + meanwhile}
        wait_until(wait_until_ended(running, len(everyone)), DELIVERED_AFTER_S, "all payments end")
        assert_one_outcome_each(running, everyone)
        failed = {
            payment_id for payment_id, (line,) in running.ended_payments().items() if line["task"] == "ledger.not_ready"
        }
        assert failed == {job["payment_id"] for job in hopeless}
        assert_ledger_matches_provider(running, calls_per_account=1)


def refused(running: System) -> int:
    """How many deliveries were answered with 503."""
    return int(running.simulator.summary()["deliveries_by_status"].get("503", 0))


def _send_one_by_one(running: System, jobs: list[dict[str, Any]], until: float) -> list[dict[str, Any]]:
    """Send jobs evenly until that time; returns those that the broker did not take."""
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
def test_half_a_minute_without_it_costs_no_payment_and_no_call(outages: dict[str, "Future[None]"], outage: str) -> None:
    """Each payment gets one outcome after the outage; payments past their deadline have failed."""
    outages[outage].result()
