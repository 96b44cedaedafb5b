"""`python -m tests.releases`: save what this release leaves behind at a deploy, as data for tests of later releases.

All roles stop with payments at every step. The contents of database, broker and correlation store are written to a
file with the name of the release. Files of earlier releases do not change.
"""

import json
import socket
import tempfile
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis
from celery.result import AsyncResult

from config.celery_config import QUEUES
from demo.processes import ROOT
from tasks.redis_source import unacked_keys
from tests.support.system import System, system, wait_until
from tests.suspension.primitive_runs import send_balance
from worker.ledger.tables import PAYMENT

SETTINGS = {
    "PAYREADY_UNCERTAIN_GRACE_S": "60",
    "PAYREADY_REFRESH_WINDOW_S": "120",
    "PAYREADY_QUILTT_READ_TIMEOUT_S": "4",
}
"""Settings of the saving and of the loading run: calls with an unknown result are not repeated in either."""


def main() -> None:
    """Save the file of this release."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/payready.db"
        with system(Path(folder), url, "web", "worker", "refresh", **SETTINGS) as running:
            leave_behind(running)
            saved = json.dumps(remaining_state(running), indent=1, sort_keys=True).replace(
                f"@{socket.gethostname()}", "@host"
            )
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    Path(__file__).with_name(f"{version}.json").write_text(saved + "\n")


def leave_behind(running: System) -> None:
    """Bring payments to every step at which a deploy may stop the roles. Then only `web` runs."""
    without_event = ("accepted", "result", "settled", "kept", "cancelled", "hopeless")
    called = dict.fromkeys(without_event, "never") | {"uncertain": "silent"}
    for number, (name, scenario) in enumerate(called.items()):
        timeout_s = 10 if name == "hopeless" else 300
        _send(running, name, f"acct_{scenario}9000{number:02}", linked=name != "result", timeout_s=timeout_s)
    _until(running, "SELECT state FROM refresh WHERE state IN ('accepted', 'uncertain')", len(called))
    _send(running, "shared", _account(running, "accepted"))
    running.simulator.post("pause")  # an early event is tried before the answer: now the answer waits
    _send(running, "calling", "acct_early900000")
    wait_until(lambda: running.simulator.calls("acct_early900000") != [], 10, "a call is in flight")
    _send(running, "deferred", "acct_throttled900000")
    _until(running, "SELECT state FROM refresh WHERE state = 'requested' AND deferral_count > 0", 1)
    assert running.rows("SELECT state FROM refresh WHERE state = 'calling'") == [{"state": "calling"}]
    running.kill("refresh")
    for number, name in enumerate(("requested", "turn")):
        _send(running, name, f"acct_prompt90000{number}")
    _until(running, "SELECT payment_id FROM payment", len(called) + 5)
    wait_until(lambda: running.unacknowledged() == 1, 10, "only the killed worker's message is unacknowledged")
    running.kill("worker")
    send_balance(running, _account(running, "settled"))
    with running.valkey_unavailable():
        send_balance(running, _account(running, "kept"))
    for name, scenario in {"job": "prompt", "poor": "poor"}.items():
        _send(running, name, f"acct_{scenario}900099", amount="25.00")
    _send_internal_messages(running)


def _send(
    running: System, name: str, account_id: str, *, linked: bool = True, timeout_s: int = 300, **job: Any
) -> "AsyncResult[Any]":
    job |= {"profile_id": "p_saved", "timeout_s": timeout_s}
    options: dict[str, Any] = {"task_id": f"task-{name}"}
    options |= running.callbacks(f"pay_{name}") if linked else {}
    return running.initiate(f"pay_{name}", account_id, options=options, **job)


def _send_internal_messages(running: System) -> None:
    """Send the messages that payready itself sends and soon consumes."""
    [stored] = running.rows("SELECT balance_id FROM balance WHERE due_at IS NOT NULL")
    polled = (_account(running, "accepted"), "p_saved")
    for name, queue, arguments in (
        ("payments.cancel", "payments", ("pay_cancelled",)),
        ("payments.cancel_by_task", "payments", (["task-unknown"],)),
        ("payments.end_hold", "payments", ("pay_released",)),
        ("accounts.read", "polls", (*polled, "ref_unknown")),
        ("balances.apply", "balances", (stored["balance_id"],)),
        ("balances.poll", "polls", polled),
        ("payments.expire", "maintenance", ()),
        ("payments.sweep", "maintenance", ()),
        ("webhooks.check_subscription", "maintenance", ()),
        ("quarantine.prune", "maintenance", ()),
    ):
        running.service.send_task(name, arguments, queue=queue, ignore_result=True)
    delayed = (_account(running, "turn"), "ref_unknown", True)
    running.service.send_task("balances.refresh", delayed, queue="refreshes", countdown=1, ignore_result=True)


def _account(running: System, name: str) -> str:
    return str(running.payment(f"pay_{name}")["account_id"])


def _until(running: System, query: str, count: int) -> None:
    wait_until(lambda: len(running.rows(query)) == count, 15, f"{query}: {count}")


def remaining_state(running: System) -> dict[str, Any]:
    """Return all that the next release will find. Tables are in the order of their foreign keys."""
    with redis.Redis.from_url(running.redis_url, decode_responses=True) as client:
        keys = list(client.scan_iter("payready:*"))
        unacknowledged = {queue: client.hgetall(unacked_keys(queue, "")[0]) for queue in QUEUES}
        tables = [table.name for table in PAYMENT.metadata.sorted_tables]
        return {
            "saved_at": datetime.now(UTC).isoformat(),
            "revision": running.rows("SELECT version_num FROM alembic_version")[0]["version_num"],
            "tables": [[table, rows] for table in tables if (rows := running.rows(f"SELECT * FROM {table}"))],
            "queues": {queue: client.lrange(queue, 0, -1) for queue in QUEUES},
            "unacknowledged": {queue: messages for queue, messages in unacknowledged.items() if messages},
            "correlation": {key: client.hgetall(key) for key in sorted(keys)},
        }


if __name__ == "__main__":
    main()
