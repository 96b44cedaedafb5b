"""SIGTERM: what runs is finished and booked, nothing new is begun, and a restart under load loses nothing."""

import signal
import time
from pathlib import Path

from tests.support.servers import Postgres
from tests.support.system import system, wait_until

GRACE_S = 30
"""What `docs/howto/monitor.md` asks a deployment to allow."""


def test_a_call_that_is_on_the_wire_is_booked_and_the_next_ones_are_left_to_others(
    tmp_path: Path, postgres_server: Postgres
) -> None:
    """The answer comes after the signal; what comes after that waits, and nothing is called twice."""
    with system(tmp_path, postgres_server.database()) as running:
        running.start_service()
        running.simulator.post("pause")  # an early event is tried before the answer: now the answer waits
        first = running.initiate("pay_1", "acct_early000001", options=running.callbacks("pay_1"))
        wait_until(lambda: len(running.simulator.calls("acct_early000001")) == 1, 10, "the call is on the wire")
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
        assert {kept.accepted for kept in running.fee_totals().values()} == {1}
        assert all(kept.match for kept in running.fee_totals().values())
