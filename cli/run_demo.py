"""`payready demo`: every scenario through the real processes, watched, and checked against what was promised."""

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

from cli import fee_tables, render_demo
from demo.demo_checks import DemoCheck, Observed, all_resolved, run_checks
from demo.demo_plan import DEMO_JOBS, DEMO_TIMINGS, EXPECTED_CALLS
from demo.dev_stack import DevStack, dev_stack
from demo.interrupts import Interrupts
from demo.processes import ROOT, StartError
from worker.ledger import fee_statement, metrics_queries, payment_report
from worker.ledger.engine import Engine, open_engine, read_only
from worker.runtime import utc_now

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
"""Settings that make time pass faster than in production."""
DEMO_TIMEOUT_S = 50.0
REFRESH_INTERVAL_S = 0.25
SETTLE_TIME_S = 0.5
"""Once all is settled, how long to look whether anything comes a second time."""

ShowBoard = Callable[[Observed], None]


@dataclass(frozen=True)
class DemoResult:
    """What came of the demo."""

    payments: list[payment_report.PaymentLine]
    fee_statement: list[fee_statement.StatementLine]
    checks: list[DemoCheck]

    @property
    def passed(self) -> bool:
        """Whether nothing was otherwise."""
        return not any(finding.failures for finding in self.checks)


def run_demo(console: Console, interrupts: Interrupts) -> DemoResult:
    """Run the demo, and say on the console how it goes.

    Raises:
        StartError, Interrupted: it could not be run to its end.
    """
    began = time.monotonic()
    folder = _folder()
    try:
        with dev_stack(folder, interrupts.check, settings=FAST_SETTINGS) as running:
            console.print(
                f"payready is up after {time.monotonic() - began:.1f} s; {len(DEMO_JOBS)} jobs are on their way"
            )
            console.print()
            played = _run_jobs(console, interrupts, running)
    except StartError:
        raise  # the message names a log in the folder
    except BaseException:
        shutil.rmtree(folder)
        raise
    _print_summary(console, folder, good=played.passed, took_s=time.monotonic() - began)
    return played


def _folder() -> Path:
    runs = ROOT / ".run"
    runs.mkdir(exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="demo-", dir=runs))


def _run_jobs(console: Console, interrupts: Interrupts, running: DevStack) -> DemoResult:
    journal = running.processes.folder / "journal.jsonl"
    engine = open_engine(running.database_url)
    began = utc_now()
    try:
        running.request_simulator("/control/defaults", put=DEMO_TIMINGS)
        running.processes.start(
            "service", SERVICE_COMMAND, SERVICE_REDIS_URL=running.redis_url, SERVICE_JOURNAL=str(journal)
        )
        with _board_display(console) as shown:
            seen = _wait_for_outcomes(interrupts, running, engine, journal, shown)
        return _print_report(console, engine, seen, began)
    finally:
        engine.dispose()


def _wait_for_outcomes(
    interrupts: Interrupts, running: DevStack, engine: Engine, journal: Path, shown: ShowBoard
) -> Observed:
    """Look on until all is settled, or patience is at its end."""
    deadline = time.monotonic() + DEMO_TIMEOUT_S
    while time.monotonic() < deadline:
        shown(seen := _observe(engine, journal, {}))
        if all_resolved(DEMO_JOBS, seen):
            interrupts.sleep(SETTLE_TIME_S)
            break
        running.processes.check_all_running()
        interrupts.sleep(REFRESH_INTERVAL_S)
    calls = running.request_simulator("/control/log")["calls"]
    shown(seen := _observe(engine, journal, Counter(call["account_id"] for call in calls if call["accepted"])))
    return seen


def _observe(engine: Engine, journal: Path, accepted: Mapping[str, int]) -> Observed:
    with read_only(engine) as tx:
        lines = payment_report.list_payments(tx, payment_ids=[order.payment_id for order in DEMO_JOBS])
        calls, backlog = (
            payment_report.call_counts_by_account(tx, list(EXPECTED_CALLS)),
            metrics_queries.backlog(tx),
        )
    return Observed(_read_journal(journal), {line.payment_id: line for line in lines}, calls, accepted, backlog)


def _read_journal(journal: Path) -> list[dict[str, Any]]:
    text = journal.read_text() if journal.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _print_report(console: Console, engine: Engine, seen: Observed, began: datetime) -> DemoResult:
    with read_only(engine) as tx:
        until = utc_now()
        lines, saved = (
            fee_statement.statement_lines(tx, began, until, "price"),
            fee_statement.savings_by_currency(tx, began, until),
        )
    found = run_checks(DEMO_JOBS, EXPECTED_CALLS, seen)
    console.print()
    console.print(fee_tables.statement_table(lines, fee_tables.totals_by_currency(lines, saved), "Fee statement"))
    console.print()
    console.print(render_demo.check_lines(found))
    return DemoResult(list(seen.payments.values()), lines, found)


def _print_summary(console: Console, folder: Path, *, good: bool, took_s: float) -> None:
    console.print()
    if good:
        shutil.rmtree(folder)
        console.print(f"[bold green]All as promised[/], in {took_s:.0f} s.", highlight=False)
    else:
        console.print(f"[bold red]Not as promised[/]; logs and ledger are in {folder}", highlight=False, soft_wrap=True)


# --- on a terminal a table that fills; elsewhere a line for each thing that happens, and then the table --------------


def _board_display(console: Console) -> AbstractContextManager[ShowBoard]:
    room = len(DEMO_JOBS) + 4
    fits = console.height >= room and console.width >= render_demo.BOARD_WIDTH
    return _live_display(console) if console.is_terminal and fits else _line_display(console)


@contextmanager
def _live_display(console: Console) -> Iterator[ShowBoard]:
    with Live(console=console, auto_refresh=False) as live:
        yield lambda seen: live.update(_render_board(console, seen), refresh=True)


@contextmanager
def _line_display(console: Console) -> Iterator[ShowBoard]:
    began, states, last = utc_now(), dict[str, str](), list[Observed]()

    def show_changes(seen: Observed) -> None:
        last[:] = [seen]
        now, told = utc_now(), _journal_states(seen)
        for order in DEMO_JOBS:
            cells = render_demo.job_cells(order, seen.payments.get(order.payment_id), told.get(order.name), now)
            state = str(cells[2])
            if state and state != states.get(order.name):
                states[order.name] = state
                line = f"{order.name:<10} {state:<9} {cells[3]:<22} {order.description}"
                console.print(f"{(now - began).total_seconds():5.1f} s  {line}", highlight=False)

    yield show_changes
    console.print()
    console.print(_render_board(console, last[0]))


def _render_board(console: Console, seen: Observed) -> RenderableType:
    return render_demo.demo_board(DEMO_JOBS, seen.payments, _journal_states(seen), utc_now(), width=console.width)


def _journal_states(seen: Observed) -> dict[str, Mapping[str, Any]]:
    return {line["order"]: line for line in seen.journal}
