"""A job that was a dead letter is processed after `payready dead-letters requeue`, on both brokers."""

import json
import signal
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from demo.processes import ROOT
from tests.support.rabbit import SERVER, UNAVAILABLE_REASON, rabbitmq
from tests.support.system import System, system, wait_until
from worker.ledger import dead_letters
from worker.ledger.engine import transaction
from worker.rules.unhandled_messages import DeadLetterReason, UnhandledMessage

pytestmark = pytest.mark.slow


@pytest.fixture(
    params=["redis", pytest.param("rabbitmq", marks=pytest.mark.skipif(not SERVER.exists(), reason=UNAVAILABLE_REASON))]
)
def payready(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[System]:
    database = f"sqlite:///{tmp_path}/payready.db"
    if request.param == "redis":
        with system(tmp_path, database) as running:
            yield running
    else:
        with (
            rabbitmq(tmp_path / "rabbitmq") as server,
            system(tmp_path, database, PAYREADY_BROKER_URL=server.url) as running,
        ):
            yield running


def fetched(payready: System) -> bytes:
    """Fetch the only message from the queue `payments`, in the form that a dead letter has."""
    with payready.service.connection_for_write() as connection:
        channel = connection.default_channel
        if hasattr(channel, "client"):
            return bytes(channel.client.rpop("payments"))
        found: Any = channel.basic_get("payments", no_ack=True)
        fields = {
            "body": b64encode(found.body.encode()).decode(),
            "content-type": found.properties["content_type"],
            "content-encoding": found.properties["content_encoding"],
            "headers": found.headers,
            "properties": {"correlation_id": found.properties["correlation_id"], "body_encoding": "base64"},
        }
        return json.dumps(fields).encode()


def test_requeued_job_is_processed_and_old_dead_letters_are_pruned(payready: System) -> None:
    """Its task has the result, and no dead letter is left."""
    payready.kill("worker", signal_number=signal.SIGTERM)
    job = payready.initiate("pay_1", "acct_prompt000001")
    letter = UnhandledMessage(
        queue="payments", reason=DeadLetterReason.WORKER_DIED, detail="", message=fetched(payready), task_id=job.id
    )
    old = UnhandledMessage(queue="payments", reason=DeadLetterReason.UNREADABLE, detail="", message=b"{")
    with transaction(payready.engine) as tx:
        [dead_letter_id] = dead_letters.store(tx, [letter], datetime.now(UTC))
        dead_letters.store(tx, [old], datetime.now(UTC) - timedelta(days=31))
    payready.start("worker")
    assert payready.rows("SELECT payment_id FROM payment") == []
    command = ["payready", "dead-letters", "requeue", dead_letter_id]
    environ = payready.processes._environ
    printed = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True, timeout=60)
    assert printed.stdout == "requeued 1 message\n"
    assert job.get(timeout=20)["state"] == "released"
    payready.service.send_task("quarantine.prune", queue="maintenance", ignore_result=True)
    wait_until(lambda: payready.rows("SELECT dead_letter_id FROM dead_letter") == [], 20, "no dead letter is left")
