"""A deploy: this release completes all work that an earlier release left in database, broker and Redis.

`python -m tests.releases` saves a file per release, with all kinds of messages and rows. All parts of a saved
continuation are in `tests/suspension/test_saved_continuation.py`.
"""

import json
import re
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis import Redis

from config.celery_config import celery_settings
from config.settings import Settings
from demo.processes import ROOT
from tasks.redis_source import unacked_keys
from tests.releases.__main__ import SETTINGS
from tests.support.servers import Postgres
from tests.support.system import System, system, wait_until
from tests.suspension.primitive_runs import send_balance

pytestmark = pytest.mark.slow


RELEASES = sorted(Path(__file__).parent.glob("*.json"))
RESOLVED_NOW = {"settled", "kept", "requested", "turn", "deferred", "job"}
"""Payments that are released without another event: by stored balances, requested calls and queued jobs."""
RESOLVED_BY_EVENT = ("accepted", "shared", "uncertain", "calling")
FAILED = {"cancelled": "cancelled", "hopeless": "timeout", "poor": "insufficient_funds"}
TIME = re.compile(r"(\d{4}-\d\d-\d\d)([T ])(\d\d:\d\d:\d\d\.\d{6})")
MICROSECONDS = re.compile(r"\b1[789]\d{14}\b")


def load_with_present_times(release: Path) -> dict[str, Any]:
    """Return what a release left, with all times moved as if it was saved now."""
    text = release.read_text()
    past = datetime.now(UTC) - datetime.fromisoformat(json.loads(text)["saved_at"])

    def moved(match: re.Match[str]) -> str:
        at = datetime.fromisoformat(f"{match[1]}T{match[3]}") + past
        return at.isoformat(match[2], "microseconds")

    text = TIME.sub(moved, text)
    return dict(
        json.loads(MICROSECONDS.sub(lambda match: str(int(match[0]) + past // timedelta(microseconds=1)), text))
    )


def alembic(url: str, revision: str) -> None:
    """Migrate a database."""
    environ = {"PATH": str(Path(sys.executable).parent), "PAYREADY_DATABASE_URL": url}
    subprocess.run(["alembic", "upgrade", revision], cwd=ROOT, env=environ, check=True, capture_output=True, timeout=60)


def fill(url: str, tables: list[tuple[str, list[dict[str, Any]]]]) -> None:
    """Insert the rows of the release. The database assigns the numbers of fee entries."""
    is_sqlite = url.startswith("sqlite")
    mark = "?" if is_sqlite else "%s"
    database = sqlite3.connect(url.removeprefix("sqlite:///")) if is_sqlite else psycopg.connect(url)
    with database:
        cursor = database.cursor()
        if not is_sqlite:
            cursor.execute("SET TIME ZONE 'UTC'")
        for table, rows in tables:
            for row in rows:
                row.pop("entry_id", None)
                names, marks = ", ".join(f'"{name}"' for name in row), ", ".join([mark] * len(row))
                values = [value if value is None or is_sqlite else str(value) for value in row.values()]
                cursor.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", values)
    database.close()


def restore(running: System, left: dict[str, Any]) -> None:
    """Restore the messages and the correlation store of the release."""
    with Redis.from_url(running.redis_url) as client:
        for queue, messages in left["queues"].items():
            for message in messages:
                client.rpush(queue, message)
        for name, unacknowledged in left["unacknowledged"].items():
            if isinstance(unacknowledged, str):  # of 0.2.0: as a worker that is stopped gives its messages back
                message, _, queue = json.loads(unacknowledged)
                client.rpush(queue, json.dumps(message))
            else:
                key, index, _ = unacked_keys(name, "")
                client.hset(key, mapping=unacknowledged)
                client.zadd(index, dict.fromkeys(unacknowledged, time.time() - 60))
        for key, fields in left["correlation"].items():
            client.hset(key, mapping=fields)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.stem)
def test_release_completes_the_work_of_an_earlier_one(
    release: Path, database: str, tmp_path: Path, postgres_server: Postgres
) -> None:
    """Each payment is resolved and delivered once, each call has a final fee entry, and no message is left."""
    left = load_with_present_times(release)
    url = f"sqlite:///{tmp_path}/payready.db" if database == "sqlite" else postgres_server.database()
    alembic(url, left["revision"])
    fill(url, left["tables"])
    with system(tmp_path, url, "web", **SETTINGS, PAYREADY_VISIBILITY_TIMEOUT_S="9") as running:
        restore(running, left)
        running.start("worker", "refresh", "beat")
        running.start_service()
        resolved_now = {f"pay_{name}" for name in RESOLVED_NOW | FAILED.keys()}
        wait_until(
            lambda: resolved_now <= running.ended_payments().keys(),
            30,
            "payments without a further event are delivered",
        )
        accounts = [str(running.payment(f"pay_{name}")["account_id"]) for name in (*RESOLVED_BY_EVENT, "result")]
        running.initiate("pay_late", accounts[0], options=running.callbacks("pay_late"))
        running.payment("pay_late")
        for account_id in accounts:
            send_balance(running, account_id)
        resolved = resolved_now | {f"pay_{name}" for name in RESOLVED_BY_EVENT} | {"pay_late"}
        wait_until(lambda: resolved <= running.ended_payments().keys(), 20, "all payments are delivered")
        assert running.service.AsyncResult("task-result").get(timeout=10)["state"] == "released"
        assert_each_outcome_is_delivered(running)
        called = [account_id for account_id in accounts if running.simulator.calls(account_id)]
        assert called == [], "a call of the earlier release was repeated"
        wait_until(lambda: running.queue_lengths() == {} and not running.unacknowledged(), 10, "no message is left")
        not_final = "SELECT call_id FROM fee_entry GROUP BY call_id HAVING count(*) <> 2"
        assert running.rows(not_final) == [], "a call has no final fee entry"
        for role in ("worker", "refresh"):
            log = running.processes.log_of(role).read_text()
            assert not re.search("Traceback|unregistered|Error", log), log


def assert_each_outcome_is_delivered(running: System) -> None:
    """Assert that each outcome was delivered once and equals the ledger's."""
    outcomes = running.ended_payments()
    rows = {row["payment_id"]: row for row in running.rows("SELECT payment_id, state, reason FROM payment")}
    assert outcomes.keys() | {"pay_result"} == rows.keys()
    assert [payment_id for payment_id, lines in outcomes.items() if len(lines) != 1] == []
    callbacks = {"released": "ledger.execute_ach", "failed": "ledger.not_ready"}
    assert {p: lines[0]["task"] for p, lines in outcomes.items()} == {p: callbacks[rows[p]["state"]] for p in outcomes}
    assert {p: row["reason"] for p, row in rows.items() if row["reason"]} == {f"pay_{n}": r for n, r in FAILED.items()}


ADDED_SINCE_THE_LAST_RELEASE = {"accounts.read", "payments.end_hold"}
"""Tasks of the unreleased version. `python -m tests.releases` saves their messages with it."""


@pytest.mark.skipif(not RELEASES, reason="no release is saved yet")
def test_all_kinds_of_messages_are_saved() -> None:
    """A kind that a release adds is saved with that release."""
    saved = RELEASES[-1].read_text()
    routes = celery_settings(Settings())["task_routes"]
    assert {name for name in routes if f'\\"{name}\\"' not in saved} == ADDED_SINCE_THE_LAST_RELEASE
