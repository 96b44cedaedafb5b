"""The console's pictures: tables and timelines for people, JSON for programs."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from cli.render import fee_text, styled_state, waited_text
from demo.demo_checks import DemoCheck
from demo.demo_plan import DemoJob
from worker.ledger.payment_report import PaymentLine

# --- the demo ---------------------------------------------------------------------------------------------------------


BOARD_COLUMNS = {
    "order": 9,
    "what happens": 26,
    "state": 8,
    "verdict or reason": 20,
    "waited": 6,
    "fee share": 15,
    "told": 4,
}
"""The columns of the demo's board, and their widths: it keeps its shape while it fills."""
BOARD_WIDTH = sum(BOARD_COLUMNS.values()) + 2 * (len(BOARD_COLUMNS) - 1)


def demo_board(
    plan: Sequence[DemoJob],
    lines: Mapping[str, PaymentLine],
    told: Mapping[str, Mapping[str, Any]],
    now: datetime,
    *,
    width: int = BOARD_WIDTH,
) -> Table:
    """The demo's orders, as far as they have come; where there is no room, without what happens in each."""
    hidden = 1 if width < BOARD_WIDTH else None
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, (name, column_width) in enumerate(BOARD_COLUMNS.items()):
        if number != hidden:
            justify: JustifyMethod = "right" if name == "waited" else "left"
            table.add_column(name, min_width=column_width, no_wrap=True, justify=justify)
    for order in plan:
        cells = job_cells(order, lines.get(order.payment_id), told.get(order.name), now)
        table.add_row(*(cell for number, cell in enumerate(cells) if number != hidden))
    return table


def job_cells(
    order: DemoJob, line: PaymentLine | None, told: Mapping[str, Any] | None, now: datetime
) -> tuple[str | Text, ...]:
    """One order's row. A job that was refused has no payment of its own."""
    tick = "✓" if told else ""
    if order.expected.state == "refused":
        ending, word = ("refused", str(told["word"])) if told else ("", "")
        return order.name, order.description, styled_state(ending), word, "", "", tick
    if line is None:
        return order.name, order.description, Text(""), "", "", "", tick
    state = styled_state(line.state.value)
    return (
        order.name,
        order.description,
        state,
        line.verdict_or_reason or "",
        waited_text(line, now),
        fee_text(line),
        tick,
    )


def check_lines(found: Sequence[DemoCheck]) -> RenderableType:
    """What the referee found."""
    return Group(*(_check_line(finding) for finding in found))


def _check_line(finding: DemoCheck) -> Text:
    text = Text()
    if finding.failures:
        text.append("✗ ", "bold red").append(f"{finding.rule}; but")
        for line in finding.failures:
            text.append(f"\n    {line}", "red")
    else:
        text.append("✓ ", "bold green").append(finding.rule)
        if finding.cases > 1:
            text.append(f" ({finding.cases})", "dim")
    return text
