"""`payready demo`: run the demo's jobs through all roles, show their progress, and check the results."""

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live

from cli import render_demo, statement_tables
from config.clock import utc_now
from demo.demo_checks import BacklogCounts, DemoCheck, Observed, all_callbacks_ran_and_no_backlog, run_checks
from demo.demo_plan import DEMO_JOBS, DEMO_TIMINGS, EXPECTED_CALLS
from demo.dev_stack import DevStack, start_sqlite_dev_stack
from demo.interrupts import Interrupts
from demo.processes import ROOT, StartOrExitError
from worker.ledger import fee_statement, metrics_queries, payment_report
from worker.ledger.engine import Engine, open_engine, read_snapshot
from worker.reports import statement_report

SERVICE_COMMAND = (
    "celery -A demo.demo_service worker --queues svc --pool solo --hostname service@%h"
    " --without-gossip --without-mingle --loglevel WARNING"
)
FAST_SETTINGS = {
    "PAYREADY_REFRESH_WINDOW_S": "6",
    "PAYREADY_UNCERTAIN_GRACE_S": "3",
    "PAYREADY_QUILTT_CONNECT_TIMEOUT_S": "1",
    "PAYREADY_QUILTT_READ_TIMEOUT_S": "2",
    "PAYREADY_CLOCK_SKEW_S": "2",
    "PAYREADY_MIN_TIME_LEFT_FOR_CALL_S": "1",
}
"""Shorter times than in production."""
DEMO_TIMEOUT_S = 50.0
REFRESH_INTERVAL_S = 0.25
BOARD_MARGIN_ROWS = 4
"""Rows of the terminal beside the board's jobs."""
SETTLE_TIME_S = 0.5
"""Observation time after the last resolution, to find a second callback."""

ShowBoard = Callable[[Observed], None]


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Result of the demo."""

    payments: list[payment_report.PaymentLine]
    fee_statement: list[fee_statement.StatementLine]
    checks: list[DemoCheck]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not any(check.failures for check in self.checks)


def run_demo(console: Console, interrupts: Interrupts) -> DemoResult:
    """Run the demo and print its progress and results.

    Raises:
        StartOrExitError: a process did not start, or exited.
        Interrupted: a signal was received.
    """
    started_at = time.monotonic()
    folder = _new_folder()
    try:
        with start_sqlite_dev_stack(folder, interrupts.check, settings=FAST_SETTINGS) as stack:
            console.print(f"payready is up after {time.monotonic() - started_at:.1f} s; sending {len(DEMO_JOBS)} jobs")
            console.print()
            result = _start_service_and_print_report(console, interrupts, stack)
    except StartOrExitError:
        raise  # the message names a log in the folder
    except BaseException:
        shutil.rmtree(folder)
        raise
    _print_summary_and_delete_folder_if_passed(
        console, folder, passed=result.passed, duration_s=time.monotonic() - started_at
    )
    return result


def _new_folder() -> Path:
    runs = ROOT / ".run"
    runs.mkdir(exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="demo-", dir=runs))


def _start_service_and_print_report(console: Console, interrupts: Interrupts, stack: DevStack) -> DemoResult:
    journal = stack.processes.folder / "journal.jsonl"
    engine = open_engine(stack.database_url, connections=1)
    started_at = utc_now()
    try:
        stack.request_simulator("/control/defaults", put=DEMO_TIMINGS)
        stack.processes.start(
            "service", SERVICE_COMMAND, SERVICE_REDIS_URL=stack.redis_url, SERVICE_JOURNAL=str(journal)
        )
        with _board_display(console) as show_board:
            observed = _wait_for_outcomes(interrupts, stack, engine, journal, show_board)
        return _check_and_print_report(console, engine, observed, started_at)
    finally:
        engine.dispose()


def _wait_for_outcomes(
    interrupts: Interrupts, stack: DevStack, engine: Engine, journal: Path, show_board: ShowBoard
) -> Observed:
    """Observe until every job is resolved, or `DEMO_TIMEOUT_S` is over."""
    deadline = time.monotonic() + DEMO_TIMEOUT_S
    while time.monotonic() < deadline:
        show_board(observed := _observe(engine, journal, {}))
        if all_callbacks_ran_and_no_backlog(DEMO_JOBS, observed):
            interrupts.sleep(SETTLE_TIME_S)
            break
        stack.processes.check_all_running()
        interrupts.sleep(REFRESH_INTERVAL_S)
    calls = stack.request_simulator("/control/log")["calls"]
    accepted = Counter(call["account_id"] for call in calls if call["accepted"])
    show_board(observed := _observe(engine, journal, accepted))
    return observed


def _observe(engine: Engine, journal: Path, accepted: Mapping[str, int]) -> Observed:
    with read_snapshot(engine) as tx:
        lines = payment_report.find_payments(tx, [job.payment_id for job in DEMO_JOBS])
        calls = payment_report.call_counts_by_account(tx, list(EXPECTED_CALLS))
        backlog = metrics_queries.backlog(tx)
    return Observed(
        journal=_read_complete_journal_lines(journal),
        payments={line.payment_id: line for line in lines},
        calls=calls,
        accepted=accepted,
        backlog=BacklogCounts(
            waiting=backlog.waiting_count,
            undelivered=backlog.undelivered.count,
            unapplied=backlog.unapplied.count,
        ),
    )


def _read_complete_journal_lines(journal: Path) -> list[dict[str, Any]]:
    text = journal.read_text() if journal.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _check_and_print_report(console: Console, engine: Engine, observed: Observed, started_at: datetime) -> DemoResult:
    with read_snapshot(engine) as tx:
        until = utc_now()
        lines = fee_statement.statement_lines(tx, started_at, until, "price")
        saved = fee_statement.savings_by_currency(tx, started_at, until)
    checks = run_checks(DEMO_JOBS, EXPECTED_CALLS, observed)
    console.print()
    console.print(
        statement_tables.limited_statement_table(
            lines, statement_report.totals_by_currency(lines, saved), ["Fee statement"]
        )
    )
    console.print()
    console.print(render_demo.check_lines(checks))
    return DemoResult(payments=list(observed.payments.values()), fee_statement=lines, checks=checks)


def _print_summary_and_delete_folder_if_passed(
    console: Console, folder: Path, *, passed: bool, duration_s: float
) -> None:
    """Print whether the demo passed. Delete its folder if it did; otherwise name it, for its logs and ledger."""
    console.print()
    if passed:
        shutil.rmtree(folder)
        console.print(f"[bold green]Success:[/] all checks passed in {duration_s:.0f} s.", highlight=False)
    else:
        console.print(
            f"[bold red]Failed:[/] at least one check failed. Logs and ledger: {folder}",
            highlight=False,
            soft_wrap=True,
        )


# --- progress: on a terminal a live table, elsewhere one line for each change of state, then the table ----------------


def _board_display(console: Console) -> AbstractContextManager[ShowBoard]:
    fits = console.height >= len(DEMO_JOBS) + BOARD_MARGIN_ROWS and console.width >= render_demo.BOARD_WIDTH
    return _live_display(console) if console.is_terminal and fits else _change_lines_then_board_display(console)


@contextmanager
def _live_display(console: Console) -> Iterator[ShowBoard]:
    with Live(console=console, auto_refresh=False) as live:
        yield lambda observed: live.update(_render_board(console, observed), refresh=True)


@contextmanager
def _change_lines_then_board_display(console: Console) -> Iterator[ShowBoard]:
    started_at, states, last = utc_now(), dict[str, str](), list[Observed]()

    def show_changes(observed: Observed) -> None:
        last[:] = [observed]
        now, journal = utc_now(), _service_journal_by_job_name(observed)
        for job in DEMO_JOBS:
            row = render_demo.board_row(job, observed.payments.get(job.payment_id), journal.get(job.name), now)
            if row.state and row.state != states.get(job.name):
                states[job.name] = row.state
                line = f"{job.name:<10} {row.state:<9} {row.verdict_or_reason:<22} {job.description}"
                console.print(f"{(now - started_at).total_seconds():5.1f} s  {line}", highlight=False)

    yield show_changes
    console.print()
    console.print(_render_board(console, last[0]))


def _render_board(console: Console, observed: Observed) -> RenderableType:
    return render_demo.demo_board(
        DEMO_JOBS, observed.payments, _service_journal_by_job_name(observed), utc_now(), available_width=console.width
    )


def _service_journal_by_job_name(observed: Observed) -> dict[str, Mapping[str, Any]]:
    return {entry["job"]: entry for entry in observed.journal}
