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

from console import sheets, show
from console.interrupts import Interrupts
from console.plan import CLOCK, COSTS, PLAN
from console.processes import ROOT, StartError
from console.referee import Finding, Seen, findings, settled
from console.stage import Stage, stage
from worker.ledger import fee_statement, payment_report
from worker.ledger.engine import Engine, open_engine, read_only
from worker.runtime import utc_now

SERVICE = (
    "celery -A console.service worker --queues svc --pool solo --hostname service@%h"
    " --without-gossip --without-mingle --loglevel WARNING"
)
QUICK = {
    "PAYREADY_REFRESH_WINDOW_S": "6",
    "PAYREADY_UNCERTAIN_GRACE_S": "3",
    "PAYREADY_QUILTT_CONNECT_TIMEOUT_S": "1",
    "PAYREADY_QUILTT_READ_TIMEOUT_S": "2",
    "PAYREADY_CLOCK_SKEW_S": "2",
    "PAYREADY_MIN_TIME_LEFT_FOR_CALL_S": "1",
}
"""Settings that make time pass faster than in production."""
PATIENCE_S = 50.0
LOOK_S = 0.25
CALM_S = 0.5
"""Once all is settled, how long to look whether anything comes a second time."""

Show = Callable[[Seen], None]


@dataclass(frozen=True)
class Played:
    """What came of the demo."""

    payments: list[payment_report.PaymentLine]
    fee_statement: list[fee_statement.StatementLine]
    findings: list[Finding]

    @property
    def as_promised(self) -> bool:
        """Whether nothing was otherwise."""
        return not any(finding.otherwise for finding in self.findings)


def demo(console: Console, interrupts: Interrupts) -> Played:
    """Run the demo, and say on the console how it goes.

    Raises:
        StartError, Interrupted: it could not be run to its end.
    """
    began = time.monotonic()
    folder = _folder()
    try:
        with stage(folder, interrupts.check, settings=QUICK) as running:
            console.print(f"payready is up after {time.monotonic() - began:.1f} s; {len(PLAN)} jobs are on their way")
            console.print()
            played = _play(console, interrupts, running)
    except StartError:
        raise  # the message names a log in the folder
    except BaseException:
        shutil.rmtree(folder)
        raise
    _farewell(console, folder, good=played.as_promised, took_s=time.monotonic() - began)
    return played


def _folder() -> Path:
    runs = ROOT / ".run"
    runs.mkdir(exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="demo-", dir=runs))


def _play(console: Console, interrupts: Interrupts, running: Stage) -> Played:
    journal = running.processes.folder / "journal.jsonl"
    engine = open_engine(running.database_url)
    began = utc_now()
    try:
        running.simulator("/control/defaults", put=CLOCK)
        running.processes.start("service", SERVICE, SERVICE_REDIS_URL=running.redis_url, SERVICE_JOURNAL=str(journal))
        with _shown(console) as shown:
            seen = _watch(interrupts, running, engine, journal, shown)
        return _report(console, engine, seen, began)
    finally:
        engine.dispose()


def _watch(interrupts: Interrupts, running: Stage, engine: Engine, journal: Path, shown: Show) -> Seen:
    """Look on until all is settled, or patience is at its end."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        shown(seen := _look(engine, journal, {}))
        if settled(PLAN, seen):
            interrupts.sleep(CALM_S)
            break
        running.processes.see_that_all_live()
        interrupts.sleep(LOOK_S)
    calls = running.simulator("/control/log")["calls"]
    shown(seen := _look(engine, journal, Counter(call["account_id"] for call in calls if call["accepted"])))
    return seen


def _look(engine: Engine, journal: Path, accepted: Mapping[str, int]) -> Seen:
    with read_only(engine) as tx:
        lines = payment_report.list_payments(tx, payment_ids=[order.payment_id for order in PLAN])
        calls, backlog = payment_report.call_counts_by_account(tx, list(COSTS)), payment_report.count_backlog(tx)
    return Seen(_heard(journal), {line.payment_id: line for line in lines}, calls, accepted, backlog)


def _heard(journal: Path) -> list[dict[str, Any]]:
    text = journal.read_text() if journal.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _report(console: Console, engine: Engine, seen: Seen, began: datetime) -> Played:
    with read_only(engine) as tx:
        until = utc_now()
        lines, saved = (
            fee_statement.statement_lines(tx, began, until, "price"),
            fee_statement.savings_by_currency(tx, began, until),
        )
    found = findings(PLAN, COSTS, seen)
    console.print()
    console.print(sheets.statement(lines, sheets.totals(lines, saved), "Fee statement"))
    console.print()
    console.print(show.verdicts(found))
    return Played(list(seen.payments.values()), lines, found)


def _farewell(console: Console, folder: Path, *, good: bool, took_s: float) -> None:
    console.print()
    if good:
        shutil.rmtree(folder)
        console.print(f"[bold green]All as promised[/], in {took_s:.0f} s.", highlight=False)
    else:
        console.print(f"[bold red]Not as promised[/]; logs and ledger are in {folder}", highlight=False, soft_wrap=True)


# --- on a terminal a table that fills; elsewhere a line for each thing that happens, and then the table --------------


def _shown(console: Console) -> AbstractContextManager[Show]:
    room = len(PLAN) + 4
    fits = console.height >= room and console.width >= show.BOARD_WIDTH
    return _live(console) if console.is_terminal and fits else _lines(console)


@contextmanager
def _live(console: Console) -> Iterator[Show]:
    with Live(console=console, auto_refresh=False) as live:
        yield lambda seen: live.update(_board(console, seen), refresh=True)


@contextmanager
def _lines(console: Console) -> Iterator[Show]:
    began, states, last = utc_now(), dict[str, str](), list[Seen]()

    def show_changes(seen: Seen) -> None:
        last[:] = [seen]
        now, told = utc_now(), _told(seen)
        for order in PLAN:
            cells = show.order_cells(order, seen.payments.get(order.payment_id), told.get(order.name), now)
            state = str(cells[2])
            if state and state != states.get(order.name):
                states[order.name] = state
                line = f"{order.name:<10} {state:<9} {cells[3]:<22} {order.tells}"
                console.print(f"{(now - began).total_seconds():5.1f} s  {line}", highlight=False)

    yield show_changes
    console.print()
    console.print(_board(console, last[0]))


def _board(console: Console, seen: Seen) -> RenderableType:
    return show.board(PLAN, seen.payments, _told(seen), utc_now(), width=console.width)


def _told(seen: Seen) -> dict[str, Mapping[str, Any]]:
    return {line["order"]: line for line in seen.journal}
