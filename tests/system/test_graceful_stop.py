"""SIGTERM: a running call is finished and recorded, no new call starts, and a restart under load loses nothing."""

import signal
import time
from pathlib import Path

import pytest

from tests.support.servers import Postgres
from tests.support.system import system, wait_until

GRACE_S = 30
"""Grace period that `docs/howto/monitor.md` requires of a deployment."""


@pytest.mark.slow
def test_call_in_flight_is_recorded_and_later_calls_are_left_to_other_workers(
    tmp_path: Path, postgres_server: Postgres
) -> None:
    """The response arrives after the signal. Later messages wait, and no account is called twice."""
    with system(tmp_path, postgres_server.database()) as running:
        running.start_service()
        running.simulator.post(
            "pause"
        )  # the webhook of `early` is sent before the response, so the pause delays the response
        first = running.initiate("pay_1", "acct_early000001", options=running.callbacks("pay_1"))
        wait_until(lambda: len(running.simulator.calls("acct_early000001")) == 1, 10, "the call is in flight")
        start = time.monotonic()
        stopping = running.processes._running.pop("refresh")
        stopping.send_signal(signal.SIGTERM)
        running.initiate_many(
            [{"payment_id": f"pay_{n}", "account_id": f"acct_prompt{n:06d}"} for n in range(2, 22)], linked=True
        )
        running.simulator.post("resume")
        stopping.wait(GRACE_S)
        assert time.monotonic() - start < GRACE_S
        assert [state for _, state in running.fees("acct_early000001")] == ["pending", "posted"]
        running.start("refresh")
        assert first.get(timeout=15)["state"] == "released"
        wait_until(lambda: len(running.ended_payments()) == 21, 30, "all payments end")
        assert {line["task"] for line in running.callbacks_received()} == {"ledger.execute_ach"}
        assert {totals.accepted for totals in running.fee_totals().values()} == {1}
        assert all(totals.match for totals in running.fee_totals().values())
