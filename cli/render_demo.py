"""Output of the demo: a table of its jobs, and the results of its checks."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from cli.render import fee_or_reused_text, styled_state, waited_text
from demo.demo_checks import DemoCheck
from demo.demo_plan import DemoJob
from worker.ledger.payment_report import PaymentLine

BOARD_COLUMNS = {
    "job": 9,
    "scenario": 26,
    "state": 8,
    "verdict or reason": 20,
    "waited": 6,
    "fee share": 15,
    "done": 4,
}
"""Columns of the demo's board with their widths in characters. Fixed widths keep the live table from moving."""
BOARD_WIDTH = sum(BOARD_COLUMNS.values()) + 2 * (len(BOARD_COLUMNS) - 1)


def demo_board(
    jobs: Sequence[DemoJob],
    lines: Mapping[str, PaymentLine],
    journal: Mapping[str, Mapping[str, Any]],
    now: datetime,
    *,
    available_width: int = BOARD_WIDTH,
) -> Table:
    """Return the demo's jobs as a table. On a narrow terminal it has no column `scenario`."""
    hidden = 1 if available_width < BOARD_WIDTH else None
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, (name, column_width) in enumerate(BOARD_COLUMNS.items()):
        if number != hidden:
            justify: JustifyMethod = "right" if name == "waited" else "left"
            table.add_column(name, min_width=column_width, no_wrap=True, justify=justify)
    for job in jobs:
        cells = job_cells(job, lines.get(job.payment_id), journal.get(job.name), now)
        table.add_row(*(cell for number, cell in enumerate(cells) if number != hidden))
    return table


def job_cells(
    job: DemoJob, line: PaymentLine | None, entry: Mapping[str, Any] | None, now: datetime
) -> tuple[str | Text, ...]:
    """Return a job's row of the board. A rejected job has no payment of its own, only an entry in the journal."""
    done = "✓" if entry else ""
    if job.expected.state == "rejected":
        state, reason = ("rejected", str(entry["reason"])) if entry else ("", "")
        return job.name, job.description, styled_state(state), reason, "", "", done
    if line is None:
        return job.name, job.description, Text(""), "", "", "", done
    state_text, reason = styled_state(line.state.value), line.verdict_or_reason or ""
    return job.name, job.description, state_text, reason, waited_text(line, now), fee_or_reused_text(line), done


def check_lines(checks: Sequence[DemoCheck]) -> RenderableType:
    """Return the results of the demo's checks, one line each, with the failures below."""
    return Group(*map(_check_line, checks))


def _check_line(check: DemoCheck) -> Text:
    text = Text()
    if check.failures:
        text.append("✗ ", "bold red").append(f"{check.rule}: failed")
        for failure in check.failures:
            text.append(f"\n    {failure}", "red")
    else:
        text.append("✓ ", "bold green").append(check.rule)
        if check.cases > 1:
            text.append(f" ({check.cases})", "dim")
    return text
