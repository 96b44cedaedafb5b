"""Output about payments and check results, for people."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from cli.render import (
    AMOUNT_FIELDS,
    TableOfOneLineRows,
    fee_or_reused_text,
    literal_text,
    new_table,
    styled_state,
    utc_time_text,
    waited_text,
)
from worker.ledger.balance_report import BalanceLine
from worker.ledger.payment_report import CallLine, DeliveryLine, FundsHoldLine, PaymentFee, PaymentLine, PaymentTimeline
from worker.rules.decimals import amount_text, amount_with_currency_text, count_text
from worker.rules.explanations import Explanation
from worker.rules.states import PaymentState

PAYMENT_COLUMNS = ("payment", "verdict or reason", "amount", "state", "waited", "requested", "account", "fee")
"""Columns of a list of payments, the most important first."""


def payment_table(lines: Sequence[PaymentLine], now: datetime) -> RenderableType:
    """Return payments as a table, each on one line."""
    if not lines:
        return Text("no payments")
    return TableOfOneLineRows(
        PAYMENT_COLUMNS, [_payment_cells(line, now) for line in lines], right=("amount", "waited")
    )


def _payment_cells(line: PaymentLine, now: datetime) -> Sequence[str | Text]:
    return (
        line.payment_id,
        line.verdict_or_reason or "",
        "" if line.amount is None else amount_with_currency_text(line.amount, line.currency),
        styled_state(line.state.value),
        waited_text(line, now),
        utc_time_text(line.requested_at),
        line.account_id,
        fee_or_reused_text(line),
    )


def released_text(outcome: Mapping[str, Any]) -> str:
    """Return the outcome of a released payment as one line."""
    fee, waited_s = outcome["fee"], outcome["waited_ms"] / 1000
    price = amount_with_currency_text(Decimal(fee["amount"]), fee["currency"])
    return f"{outcome['payment_id']} released: {outcome['verdict']}, after {waited_s:.1f} s, fee {price} {fee['state']}"


# --- one payment ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TimelineEvent:
    """A row of a payment's timeline."""

    at: datetime
    name: str
    detail: str


def payment_timeline(timeline: PaymentTimeline, explained: Explanation, now: datetime) -> RenderableType:
    """Return one payment: its state, its explanation, its events in order of time, and facts about it."""
    line = timeline.payment
    table = new_table("after", "event", "detail", right=["after"])
    table.columns[-1].no_wrap = False
    for event in sorted(_unsorted_timeline_events(timeline), key=lambda event: event.at):
        table.add_row(f"{(event.at - line.requested_at).total_seconds():.3f} s", event.name, event.detail)
    account_id = literal_text(line.account_id)
    head = Text.assemble(literal_text(line.payment_id, "bold"), "  ", account_id, "  ", styled_state(line.state.value))
    if line.verdict_or_reason:
        head.append(literal_text(f": {line.verdict_or_reason}"))
    facts = [literal_text(fact) for fact in _explanation_lines(timeline, now)]
    requested = Text(f"requested {line.requested_at:%Y-%m-%d %H:%M:%S.%f}Z", "dim")
    return Group(head, requested, literal_text(explained.sentence, "bold"), Text(), table, Text(), *facts)


def _unsorted_timeline_events(timeline: PaymentTimeline) -> Iterator[TimelineEvent]:
    line = timeline.payment
    yield TimelineEvent(at=line.requested_at, name="job accepted", detail=_amount_and_timeout_text(timeline))
    for call in timeline.calls:
        price = amount_with_currency_text(call.price, call.currency)
        yield TimelineEvent(at=call.called_at, name="call", detail=f"{call.call_id}, fee entry pending: {price}")
        if call.finalized_at:
            detail = f"{call.call_id}, {_evidence_text(call)}"
            yield TimelineEvent(at=call.finalized_at, name=f"fee {call.state}", detail=detail)
    yield from _balance_events(timeline)
    if line.resolved_at:
        yield TimelineEvent(at=line.resolved_at, name=line.state.value, detail=line.verdict_or_reason or "")
    else:
        yield TimelineEvent(at=line.deadline, name="deadline", detail="")
    for delivery in timeline.deliveries:
        if delivery.delivered_at:
            detail = f"to task {delivery.task_id}"
            yield TimelineEvent(at=delivery.delivered_at, name="outcome delivered", detail=detail)


def _balance_events(timeline: PaymentTimeline) -> Iterator[TimelineEvent]:
    rejected = {line.balance.balance_id for line in timeline.rejected_balances}
    resolving = [timeline.balance] if timeline.balance else []
    unattributed = {line.balance_id: line for line in timeline.unattributed_balances}
    others = [unattributed[key] for key in unattributed.keys() - rejected - {line.balance_id for line in resolving}]
    for balance in (*resolving, *others, *timeline.unapplied_balances):
        detail = _balance_text(timeline, balance)
        yield TimelineEvent(at=balance.received_at, name="balance", detail=detail)
    for line in timeline.rejected_balances:
        detail = _balance_text(timeline, line.balance)
        yield TimelineEvent(at=line.balance.received_at, name="balance rejected", detail=detail)


def _amount_and_timeout_text(timeline: PaymentTimeline) -> str:
    job, currency = timeline.job, _job_currency_or_usd(timeline)
    amount = amount_with_currency_text(Decimal(job["amount"]), currency) if "amount" in job else "no amount"
    timeout_s = (timeline.payment.deadline - timeline.payment.requested_at).total_seconds()
    return f"{amount}, timeout {timeout_s:.0f} s"


def _job_currency_or_usd(timeline: PaymentTimeline) -> str:
    return str(timeline.job.get("currency", "USD"))


def _evidence_text(call: CallLine) -> str:
    return ", ".join(f"{key} {value}" for key, value in (call.evidence or {}).items())


def _balance_text(timeline: PaymentTimeline, balance: BalanceLine) -> str:
    available = "null" if balance.available is None else amount_text(balance.available, _job_currency_or_usd(timeline))
    text = f"{balance.balance_id}, {balance.event_id}, available {available}, as of {utc_time_text(balance.as_of)}"
    if balance.at != balance.as_of:
        text += f", its own time {utc_time_text(balance.at)}"
    is_unattributed = any(line.balance_id == balance.balance_id for line in timeline.unattributed_balances)
    return f"{text}, attributed to no call" if is_unattributed else text


def _explanation_lines(timeline: PaymentTimeline, now: datetime) -> Iterator[str]:
    line = timeline.payment
    if line.state == PaymentState.WAITING:
        yield f"waiting for {waited_text(line, now)} for a balance of {line.account_id}"
    if timeline.unapplied_balances:
        yield _unapplied_text(timeline.unapplied_balances)
    for rejected in timeline.rejected_balances:
        yield f"balance {rejected.balance.balance_id} rejected as {rejected.reason}: {rejected.detail}"
    if timeline.funds_calculation:
        yield _funds_calculation_text(timeline.funds_calculation)
    if line.state == PaymentState.FAILED and timeline.outcome:
        yield f"detail: {timeline.outcome['detail']}"
    if timeline.funds_hold:
        yield _funds_hold_text(timeline, timeline.funds_hold, now)
    if timeline.refresh:
        last_error = f", last error: {timeline.refresh.last_error}" if timeline.refresh.last_error else ""
        yield f"refresh {timeline.refresh.refresh_id}: {timeline.refresh.state}{last_error}"
    yield _fee_fact(timeline)
    yield from _delivery_texts(timeline)
    for key, value in timeline.job.get("metadata", {}).items():
        yield f"metadata {key}: {value if isinstance(value, str) else json.dumps(value)}"


def _delivery_texts(timeline: PaymentTimeline) -> Iterator[str]:
    """Yield which outcomes are not delivered, and the callbacks of each task."""
    given_up = [delivery for delivery in timeline.deliveries if delivery.undeliverable]
    for delivery in given_up:
        yield f"callbacks of task {delivery.task_id} cannot be sent: {delivery.undeliverable}"
    undelivered = [
        delivery.task_id for delivery in timeline.deliveries if not delivery.delivered_at and not delivery.undeliverable
    ]
    if undelivered and timeline.payment.resolved_at:
        yield f"outcome not delivered yet: {', '.join(undelivered)}"
    for delivery in timeline.deliveries:
        yield from _callback_texts(timeline.payment.state, delivery)


def _callback_texts(state: PaymentState, delivery: DeliveryLine) -> Iterator[str]:
    """Yield the callbacks of the payment's outcome; of both outcomes while it waits."""
    for callback in delivery.callbacks:
        outcome = PaymentState.FAILED if callback.kind == "link_error" else PaymentState.RELEASED
        if state not in (PaymentState.WAITING, outcome):
            continue
        condition = f", if {outcome}" if state == PaymentState.WAITING else ""
        verb = "not sent" if delivery.undeliverable else "sent" if delivery.delivered_at else "to be sent"
        yield (
            f"{callback.kind} of task {delivery.task_id}: {callback.task} {verb} to queue {callback.queue} "
            f"as task {callback.task_id}{condition}"
        )


def _funds_hold_text(timeline: PaymentTimeline, hold: FundsHoldLine, now: datetime) -> str:
    amount = amount_with_currency_text(Decimal(timeline.job["amount"]), _job_currency_or_usd(timeline))
    if hold.until is None:
        return f"funds hold: {amount} until {hold.after_delivery_s} s after the outcome is delivered"
    ended = "ended" if hold.until <= now else "until"
    return f"funds hold: {amount} {ended} {utc_time_text(hold.until)}"


def _unapplied_text(balances: Sequence[BalanceLine]) -> str:
    ids = ", ".join(balance.balance_id for balance in balances)
    verb = "is" if len(balances) == 1 else "are"
    return f"{count_text(len(balances), 'balance')} arrived and {verb} not applied yet: {ids}"


def _fee_fact(timeline: PaymentTimeline) -> str:
    line = timeline.payment
    if line.reused:
        call = next(iter(timeline.calls), None)
        saved = f", saved {amount_with_currency_text(call.price, call.currency)}" if call else ""
        return f"fee: none, reused the balance of an earlier call{saved}"
    if line.state == PaymentState.WAITING:
        return "fee: known when the payment is resolved"
    return "fee: none" if line.fee is None else f"fee: {_share_text(line.fee)}"


def _share_text(fee: PaymentFee) -> str:
    amount = f"{amount_with_currency_text(fee.amount, fee.currency)}, {fee.state}"
    if fee.shared_by == 1:
        return amount
    total = amount_with_currency_text(fee.total, fee.currency)
    return f"{amount}: share of {total} among {count_text(fee.shared_by, 'payment')}"


def _funds_calculation_text(calculation: Mapping[str, Any]) -> str:
    """Return the funds calculation as two sums: needed and available funds."""
    currency = calculation["currency"]
    amounts = {
        key: amount_text(Decimal(value), currency)
        for key, value in calculation.items()
        if key in AMOUNT_FIELDS and value is not None
    }
    needed = f"needed {amounts['needed']} {currency}"
    if amounts["needed"] != amounts["amount"]:
        needed += f" = {amounts['amount']} * {calculation['multiplier']} + {amounts['fixed']}"
    if "available_after_holds" not in amounts:
        return f"{needed}; available funds unknown"
    terms = [f"{amounts['available']} balance"]
    if "limit" in amounts:
        terms.append(f"+ {amounts['limit']} overdraft")
    if calculation["held_count"]:
        terms.append(f"- {amounts['held']} held for {_held_payments_text(calculation)}")
    available = f"available {amounts['available_after_holds']} {currency}"
    return f"{needed}; {available}" if len(terms) == 1 else f"{needed}; {available} = {' '.join(terms)}"


def _held_payments_text(calculation: Mapping[str, Any]) -> str:
    payments = count_text(calculation["held_count"], "payment")
    if "held_until" not in calculation:  # a payment of version 0.2.0
        return payments
    until = calculation["held_until"]
    return f"{payments}, until {until}" if until else f"{payments}, outcome not delivered yet"
