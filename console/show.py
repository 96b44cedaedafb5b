"""The console's pictures: tables and timelines for people, JSON for programs."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from console.doctor import Diagnosis, Grade
from console.plan import Order
from console.referee import Finding
from worker.ledger.payment_report import CallLine, PaymentFee, PaymentLine, PaymentTimeline
from worker.rules.decimals import decimal_text
from worker.rules.states import PaymentState

SUMS = ("amount", "fixed", "needed", "available", "limit", "released_since_balance", "available_after_releases")
"""The sums of money in a verdict's funds_calculation."""
STYLES = {
    "released": "green",
    "failed": "red",
    "refused": "red",
    "waiting": "yellow",
    "posted": "",
    "pending": "yellow",
}


def as_json(value: Any) -> str:
    """Any report as JSON: money as strings, times in UTC."""
    return json.dumps(value, default=_json_value, indent=2)


def _json_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Decimal):
        return decimal_text(value)
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    raise TypeError(f"{type(value).__name__} has no JSON")


def money(value: Decimal) -> str:
    """A sum with two decimal places, or as many more as it has."""
    whole, _, fraction = decimal_text(value).partition(".")
    return f"{whole}.{fraction.rstrip('0').ljust(2, '0')}"


def _fee(line: PaymentLine) -> str:
    return "reused" if line.reused else f"{money(line.fee.amount)} {line.fee.state}" if line.fee else ""


def _waited(line: PaymentLine, now: datetime) -> str:
    return f"{((line.resolved_at or now) - line.requested_at).total_seconds():.1f} s"


def styled(state: str) -> Text:
    """A state in its colour."""
    return Text(state, STYLES.get(state, ""))


FOLDED = ("payment", "account", "call", "number", "price list", "what happened", "verdict or reason")
"""Columns that go over several lines where there is no room: names. Sums, counts, states and times are never cut."""
FOLDED_WIDTH = 8
"""So wide at least."""
GAP = 2
"""Between columns."""


class _Sheet(Table):
    """A table whose cells say what they say: what others wrote is no markup, and where it has no room nothing is cut.

    Names are folded; where that is not enough, each row becomes a list of its cells.
    """

    def __init__(self, title: str | None) -> None:
        super().__init__(
            box=None, pad_edge=False, title=title, title_justify="left", title_style="bold", header_style="dim"
        )
        self._told: list[tuple[Text, ...]] = []

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row; text is taken as it is."""
        texts = tuple(Text(cell) if isinstance(cell, str) else cell for cell in cells)
        self._told.append(texts)
        super().add_row(*texts, **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._least_width() <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        if self.title is not None:
            yield Text(str(self.title), "bold")
        for row in self._told:
            record = Table.grid(padding=(0, GAP))
            record.add_column(style="dim", no_wrap=True)
            record.add_column(overflow="fold")
            for column, cell in zip(self.columns, row, strict=True):
                record.add_row(str(column.header), cell)
            yield from (record, Text())

    def _least_width(self) -> int:
        least = GAP * (len(self.columns) - 1)
        for number, column in enumerate(self.columns):
            widest = max(cell_len(str(column.header)), *(row[number].cell_len for row in self._told), 0)
            least += widest if column.no_wrap else min(widest, FOLDED_WIDTH)
        return least


def table(*columns: str, right: Iterable[str] = (), title: str | None = None) -> Table:
    """An empty table, with these columns."""
    made = _Sheet(title)
    for column in columns:
        justify: JustifyMethod = "right" if column in right else "left"
        made.add_column(column, justify=justify, no_wrap=column not in FOLDED, overflow="fold")
    return made


def payments(lines: Sequence[PaymentLine], now: datetime) -> RenderableType:
    """Payments as a list."""
    if not lines:
        return Text("no payments")
    listed = table("payment", "account", "state", "verdict or reason", "waited", "fee", "requested", right=["waited"])
    for line in lines:
        requested = f"{line.requested_at:%Y-%m-%d %H:%M:%S}Z"
        state = styled(line.state.value)
        listed.add_row(
            line.payment_id,
            line.account_id,
            state,
            line.verdict_or_reason or "",
            _waited(line, now),
            _fee(line),
            requested,
        )
    return listed


# --- the demo ---------------------------------------------------------------------------------------------------------


BOARD = {"order": 9, "what happens": 26, "state": 8, "verdict or reason": 20, "waited": 6, "fee share": 15, "told": 4}
"""The columns of the demo's board, and their widths: it keeps its shape while it fills."""
BOARD_WIDTH = sum(BOARD.values()) + 2 * (len(BOARD) - 1)


def board(
    plan: Sequence[Order],
    lines: Mapping[str, PaymentLine],
    told: Mapping[str, Mapping[str, Any]],
    now: datetime,
    *,
    width: int = BOARD_WIDTH,
) -> Table:
    """The demo's orders, as far as they have come; where there is no room, without what happens in each."""
    hidden = 1 if width < BOARD_WIDTH else None
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, (name, column_width) in enumerate(BOARD.items()):
        if number != hidden:
            justify: JustifyMethod = "right" if name == "waited" else "left"
            table.add_column(name, min_width=column_width, no_wrap=True, justify=justify)
    for order in plan:
        cells = order_cells(order, lines.get(order.payment_id), told.get(order.name), now)
        table.add_row(*(cell for number, cell in enumerate(cells) if number != hidden))
    return table


def order_cells(
    order: Order, line: PaymentLine | None, told: Mapping[str, Any] | None, now: datetime
) -> tuple[str | Text, ...]:
    """One order's row. A job that was refused has no payment of its own."""
    tick = "✓" if told else ""
    if order.promise.end == "refused":
        ending, word = ("refused", str(told["word"])) if told else ("", "")
        return order.name, order.tells, styled(ending), word, "", "", tick
    if line is None:
        return order.name, order.tells, Text(""), "", "", "", tick
    state = styled(line.state.value)
    return order.name, order.tells, state, line.verdict_or_reason or "", _waited(line, now), _fee(line), tick


def verdicts(found: Sequence[Finding]) -> RenderableType:
    """What the referee found."""
    return Group(*(_finding(finding) for finding in found))


def _finding(finding: Finding) -> Text:
    text = Text()
    if finding.otherwise:
        text.append("✗ ", "bold red").append(f"{finding.promise}; but")
        for line in finding.otherwise:
            text.append(f"\n    {line}", "red")
    else:
        text.append("✓ ", "bold green").append(finding.promise)
        if finding.cases > 1:
            text.append(f" ({finding.cases})", "dim")
    return text


def diagnosis(told: Diagnosis) -> Text:
    """What a check of the doctor found, in a line, and what to do in another."""
    mark, style = {Grade.OK: ("✓ ", "green"), Grade.NOTE: ("! ", "yellow"), Grade.FAULT: ("✗ ", "red")}[told.grade]
    text = Text().append(mark, f"bold {style}").append(f"{told.check}: {told.found}")
    return text.append(f"\n    {told.remedy}", style) if told.remedy else text


# --- one payment ------------------------------------------------------------------------------------------------------


def timeline(found: PaymentTimeline, now: datetime) -> RenderableType:
    """Everything that is known of one payment, in the order in which it happened."""
    line = found.payment
    steps = table("after", "what", "", right=["after"])
    steps.columns[-1].no_wrap = False
    for at, what, detail in sorted(_events(found), key=lambda event: event[0]):
        steps.add_row(f"{(at - line.requested_at).total_seconds():.3f} s", what, detail)
    head = Text.assemble((line.payment_id, "bold"), "  ", line.account_id, "  ", styled(line.state.value))
    if line.verdict_or_reason:
        head.append(f": {line.verdict_or_reason}")
    facts = [Text(fact) for fact in _facts(found, now)]
    return Group(
        head, Text(f"requested {line.requested_at:%Y-%m-%d %H:%M:%S.%f}Z", "dim"), Text(), steps, Text(), *facts
    )


def _events(found: PaymentTimeline) -> Iterator[tuple[datetime, str, str]]:
    line = found.payment
    yield line.requested_at, "job taken in", _job(found)
    for call in found.calls:
        yield call.called_at, "call", f"{call.call_id}, fee entry pending: {money(call.price)} {call.currency}"
        if call.finalized_at:
            yield call.finalized_at, f"fee {call.state}", f"{call.call_id}, {_evidence(call)}"
    if found.balance:
        figure = "null" if found.balance.available is None else money(found.balance.available)
        yield (
            found.balance.received_at,
            "balance",
            f"{found.balance.balance_id}, {found.balance.event_id}, available {figure}, {_at(found)}",
        )
    if line.resolved_at:
        yield line.resolved_at, line.state.value, line.verdict_or_reason or ""
    else:
        yield line.deadline, "deadline", "not yet"
    for reply in found.deliveries:
        if reply.delivered_at:
            yield reply.delivered_at, "outcome delivered", f"to task {reply.task_id}"


def _job(found: PaymentTimeline) -> str:
    job = found.job
    amount = f"{job['amount']} {job.get('currency', 'USD')}" if "amount" in job else "no amount"
    seconds = (found.payment.deadline - found.payment.requested_at).total_seconds()
    return f"{amount}, waits {seconds:.0f} s at most"


def _evidence(call: CallLine) -> str:
    return ", ".join(f"{key} {value}" for key, value in (call.evidence or {}).items())


def _at(found: PaymentTimeline) -> str:
    return f"as of {found.balance.at:%H:%M:%S}Z" if found.balance else ""


def _facts(found: PaymentTimeline, now: datetime) -> Iterator[str]:
    line = found.payment
    if line.state == PaymentState.WAITING:
        yield f"waits since {_waited(line, now)} for a balance of {line.account_id}"
    if found.funds_calculation:
        yield _sentence(found.funds_calculation)
    if line.state == PaymentState.FAILED and found.outcome:
        yield f"detail: {found.outcome['detail']}"
    if found.refresh:
        yield f"refresh {found.refresh.refresh_id}: {found.refresh.state}" + (
            f", last trouble: {found.refresh.last_error}" if found.refresh.last_error else ""
        )
    yield _fee_fact(found)
    waiting = [reply.task_id for reply in found.deliveries if not reply.delivered_at]
    if waiting:
        yield f"not told yet: {', '.join(waiting)}"


def _fee_fact(found: PaymentTimeline) -> str:
    line = found.payment
    if line.reused:
        saved = f", which saved {money(found.calls[0].price)} {found.calls[0].currency}" if found.calls else ""
        return f"fee: none, an earlier call's balance served{saved}"
    if line.state == PaymentState.WAITING:
        return "fee: its share is known when it is settled"
    return "fee: none" if line.fee is None else f"fee: {_share(line.fee)}"


def _share(fee: PaymentFee) -> str:
    amount = f"{decimal_text(fee.amount)} {fee.currency}, {fee.state}"
    return (
        amount if fee.shared_by == 1 else f"{amount}: a share of {money(fee.total)}, between {fee.shared_by} payments"
    )


def _sentence(funds_calculation: Mapping[str, Any]) -> str:
    """The verdict's funds_calculation as sums."""
    sums = {key: money(Decimal(value)) for key, value in funds_calculation.items() if key in SUMS and value is not None}
    needed = f"{sums['needed']} {funds_calculation['currency']} needed"
    if sums["needed"] != sums["amount"]:
        needed += f" = {sums['amount']} * {funds_calculation['multiplier']} + {sums['fixed']}"
    if "available_after_releases" not in sums:
        return f"{needed}; what is available is not known"
    parts = [f"{sums['available']} available"]
    if "limit" in sums:
        parts.append(f"+ {sums['limit']} overdraft")
    if funds_calculation["released_count"]:
        parts.append(f"- {sums['released_since_balance']} released on it since ({funds_calculation['released_count']})")
    return (
        f"{needed}; {parts[0]}"
        if len(parts) == 1
        else f"{needed}; {sums['available_after_releases']} there = {' '.join(parts)}"
    )
