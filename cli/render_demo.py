"""Output of the demo: a table of its jobs, and the results of its checks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    table = Table(box=None, pad_edge=False, header_style="dim")
    columns = [name for name in BOARD_COLUMNS if available_width >= BOARD_WIDTH or name != "scenario"]
    for name in columns:
        justify: JustifyMethod = "right" if name == "waited" else "left"
        table.add_column(name, min_width=BOARD_COLUMNS[name], no_wrap=True, justify=justify)
    for job in jobs:
        cells = board_row(job, lines.get(job.payment_id), journal.get(job.name), now).cells_by_column()
        table.add_row(*(cells[name] for name in columns))
    return table


@dataclass(frozen=True, kw_only=True)
class BoardRow:
    """A job's row of the board. Before the job is accepted, most cells are empty."""

    job: DemoJob
    state: str = ""
    verdict_or_reason: str = ""
    waited: str = ""
    fee_share: str = ""
    is_done: bool
    """Whether its callback ran."""

    def cells_by_column(self) -> dict[str, str | Text]:
        """Return the cells by the names of `BOARD_COLUMNS`."""
        return {
            "job": self.job.name,
            "scenario": self.job.description,
            "state": styled_state(self.state),
            "verdict or reason": self.verdict_or_reason,
            "waited": self.waited,
            "fee share": self.fee_share,
            "done": "✓" if self.is_done else "",
        }


def board_row(job: DemoJob, line: PaymentLine | None, entry: Mapping[str, Any] | None, now: datetime) -> BoardRow:
    """Return a job's row. A rejected job has no payment of its own, only an entry in the journal."""
    if job.expected.state == "rejected":
        if entry is None:
            return BoardRow(job=job, is_done=False)
        return BoardRow(job=job, state="rejected", verdict_or_reason=str(entry["reason"]), is_done=True)
    if line is None:
        return BoardRow(job=job, is_done=entry is not None)
    return BoardRow(
        job=job,
        state=line.state.value,
        verdict_or_reason=line.verdict_or_reason or "",
        waited=waited_text(line, now),
        fee_share=fee_or_reused_text(line),
        is_done=entry is not None,
    )


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
