"""The console's pictures: tables and timelines for people, JSON for programs."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from cli.doctor_results import CheckResult, Severity
from cli.render import AMOUNT_FIELDS, fee_text, money_text, new_table, styled_state, waited_text
from worker.ledger.payment_report import CallLine, PaymentFee, PaymentLine, PaymentTimeline
from worker.rules.decimals import decimal_text
from worker.rules.states import PaymentState


def payment_table(lines: Sequence[PaymentLine], now: datetime) -> RenderableType:
    """Payments as a list."""
    if not lines:
        return Text("no payments")
    listed = new_table(
        "payment", "account", "state", "verdict or reason", "waited", "fee", "requested", right=["waited"]
    )
    for line in lines:
        requested = f"{line.requested_at:%Y-%m-%d %H:%M:%S}Z"
        state = styled_state(line.state.value)
        listed.add_row(
            line.payment_id,
            line.account_id,
            state,
            line.verdict_or_reason or "",
            waited_text(line, now),
            fee_text(line),
            requested,
        )
    return listed


def check_result_table(told: CheckResult) -> Text:
    """What a check of the doctor found, in a line, and what to do in another."""
    mark, style = {Severity.OK: ("✓ ", "green"), Severity.WARNING: ("! ", "yellow"), Severity.ERROR: ("✗ ", "red")}[
        told.severity
    ]
    text = Text().append(mark, f"bold {style}").append(f"{told.check}: {told.message}")
    return text.append(f"\n    {told.fix}", style) if told.fix else text


# --- one payment ------------------------------------------------------------------------------------------------------


def payment_timeline(found: PaymentTimeline, now: datetime) -> RenderableType:
    """Everything that is known of one payment, in the order in which it happened."""
    line = found.payment
    steps = new_table("after", "what", "", right=["after"])
    steps.columns[-1].no_wrap = False
    for at, what, detail in sorted(_timeline_events(found), key=lambda event: event[0]):
        steps.add_row(f"{(at - line.requested_at).total_seconds():.3f} s", what, detail)
    head = Text.assemble((line.payment_id, "bold"), "  ", line.account_id, "  ", styled_state(line.state.value))
    if line.verdict_or_reason:
        head.append(f": {line.verdict_or_reason}")
    facts = [Text(fact) for fact in _payment_facts(found, now)]
    return Group(
        head, Text(f"requested {line.requested_at:%Y-%m-%d %H:%M:%S.%f}Z", "dim"), Text(), steps, Text(), *facts
    )


def _timeline_events(found: PaymentTimeline) -> Iterator[tuple[datetime, str, str]]:
    line = found.payment
    yield line.requested_at, "job taken in", _job_text(found)
    for call in found.calls:
        yield call.called_at, "call", f"{call.call_id}, fee entry pending: {money_text(call.price)} {call.currency}"
        if call.finalized_at:
            yield call.finalized_at, f"fee {call.state}", f"{call.call_id}, {_evidence_text(call)}"
    if found.balance:
        figure = "null" if found.balance.available is None else money_text(found.balance.available)
        yield (
            found.balance.received_at,
            "balance",
            f"{found.balance.balance_id}, {found.balance.event_id}, available {figure}, {_time_column(found)}",
        )
    if line.resolved_at:
        yield line.resolved_at, line.state.value, line.verdict_or_reason or ""
    else:
        yield line.deadline, "deadline", "not yet"
    for reply in found.deliveries:
        if reply.delivered_at:
            yield reply.delivered_at, "outcome delivered", f"to task {reply.task_id}"


def _job_text(found: PaymentTimeline) -> str:
    job = found.job
    amount = f"{job['amount']} {job.get('currency', 'USD')}" if "amount" in job else "no amount"
    seconds = (found.payment.deadline - found.payment.requested_at).total_seconds()
    return f"{amount}, waits {seconds:.0f} s at most"


def _evidence_text(call: CallLine) -> str:
    return ", ".join(f"{key} {value}" for key, value in (call.evidence or {}).items())


def _time_column(found: PaymentTimeline) -> str:
    return f"as of {found.balance.at:%H:%M:%S}Z" if found.balance else ""


def _payment_facts(found: PaymentTimeline, now: datetime) -> Iterator[str]:
    line = found.payment
    if line.state == PaymentState.WAITING:
        yield f"waits since {waited_text(line, now)} for a balance of {line.account_id}"
    if found.funds_calculation:
        yield _calculation_text(found.funds_calculation)
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
        saved = f", which saved {money_text(found.calls[0].price)} {found.calls[0].currency}" if found.calls else ""
        return f"fee: none, an earlier call's balance served{saved}"
    if line.state == PaymentState.WAITING:
        return "fee: its share is known when it is settled"
    return "fee: none" if line.fee is None else f"fee: {_share_text(line.fee)}"


def _share_text(fee: PaymentFee) -> str:
    amount = f"{decimal_text(fee.amount)} {fee.currency}, {fee.state}"
    return (
        amount
        if fee.shared_by == 1
        else f"{amount}: a share of {money_text(fee.total)}, between {fee.shared_by} payments"
    )


def _calculation_text(funds_calculation: Mapping[str, Any]) -> str:
    """The verdict's funds_calculation as sums."""
    sums = {
        key: money_text(Decimal(value))
        for key, value in funds_calculation.items()
        if key in AMOUNT_FIELDS and value is not None
    }
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
