"""Measure the CPU time of commands, each in a process of its own, on a small ledger."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from demo.processes import ROOT
from tests.migrations_in_step import alembic
from tests.support.servers import Postgres
from worker.ledger import payments
from worker.ledger.engine import open_engine, transaction
from worker.rules.job import Job

RUNS = 10
"""Runs of each command that count, after a first one, for which Python may compile the code."""
PAYMENTS = 60
_COMMANDS_WITHOUT_LEDGER: Mapping[str, Sequence[str]] = {
    "version": ("--version",),
    "help": ("--help",),
    "payment_help": ("payment", "--help"),
    "payment_list_help": ("payment", "list", "--help"),
}
_COMMANDS: Mapping[str, Sequence[str]] = {
    "payment_list": ("payment", "list"),
    "payment_list_json": ("payment", "list", "--json"),
    "payment_show": ("payment", "show", "pay_1"),
    "dead_letters_list": ("dead-letters", "list"),
    "quarantine_list": ("quarantine", "list"),
    "fees_statement": ("fees", "statement"),
}


def measure(_sizes: argparse.Namespace) -> dict[str, Any]:
    """Run commands on SQLite and on PostgreSQL. The figures are medians of user and system time in milliseconds."""
    with tempfile.TemporaryDirectory(prefix="payready-bench-") as home, tempfile.TemporaryDirectory() as folder:
        server = Postgres(Path(home))
        try:
            sqlite = _cpu_on_ledger(f"sqlite:///{folder}/ledger.db")
            postgresql = _cpu_on_ledger(server.database())
        finally:
            server.stop()
    without_ledger = {name: _median_cpu_ms(command, {}) for name, command in _COMMANDS_WITHOUT_LEDGER.items()}
    return {"without_ledger_ms": without_ledger, "sqlite_ms": sqlite, "postgresql_ms": postgresql}


def _cpu_on_ledger(url: str) -> dict[str, int]:
    alembic(url, "upgrade", "head")
    engine, now = open_engine(url, connections=1), datetime.now(UTC)
    jobs = [Job(payment_id=f"pay_{n}", account_id=f"acct_{n}", amount=Decimal(n)) for n in range(1, PAYMENTS + 1)]
    with transaction(engine) as tx:
        payments.insert_payments(tx, [payments.new_payment(job, now) for job in jobs])
    engine.dispose()
    return {name: _median_cpu_ms(command, {"PAYREADY_DATABASE_URL": url}) for name, command in _COMMANDS.items()}


def _median_cpu_ms(command: Sequence[str], settings: Mapping[str, str]) -> int:
    _, *counted = (_cpu_s(command, settings) for _ in range(RUNS + 1))
    return round(statistics.median(counted) * 1000)


def _cpu_s(command: Sequence[str], settings: Mapping[str, str]) -> float:
    """Run a command, and return its user and system time."""
    environ = {**os.environ, **settings}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    line, null = [sys.executable, "-m", "cli.main", *command], subprocess.DEVNULL
    with subprocess.Popen(line, cwd=ROOT, env=environ, stdout=null, stderr=null) as process:  # noqa: S603 - our own code
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"payready {' '.join(command)} ended with status {process.returncode}")
    return used.ru_utime + used.ru_stime
