"""Output about payments and check results, for people."""

import json
from collections.abc import Iterator, Mapping, Sequence
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
    waited_text,
)
from worker.ledger.balance_report import BalanceLine
from worker.ledger.payment_history import (
    callbacks_of_outcome,
    fee_text,
    funds_hold_text,
    outcome_of_callback,
    timeline_events,
)
from worker.ledger.payment_report import DeliveryLine, PaymentLine, PaymentTimeline
from worker.rules.decimals import amount_text, amount_with_currency_text, count_text
from worker.rules.payment_situations import Explanation
from worker.rules.states import PaymentState
from worker.rules.times import utc_time_text

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


def payment_timeline(timeline: PaymentTimeline, explained: Explanation, now: datetime) -> RenderableType:
    """Return one payment: its state, its explanation, its events in order of time, and facts about it."""
    line = timeline.payment
    table = new_table("after", "event", "detail", right=["after"])
    table.columns[-1].no_wrap = False
    for event in timeline_events(timeline):
        table.add_row(f"{(event.at - line.requested_at).total_seconds():.3f} s", event.name, event.detail)
    account_id = literal_text(line.account_id)
    head = Text.assemble(literal_text(line.payment_id, "bold"), "  ", account_id, "  ", styled_state(line.state.value))
    if line.verdict_or_reason:
        head.append(literal_text(f": {line.verdict_or_reason}"))
    facts = [literal_text(fact) for fact in _explanation_lines(timeline, now)]
    requested = Text(f"requested {line.requested_at:%Y-%m-%d %H:%M:%S.%f}Z", "dim")
    explanation = [literal_text(explained.sentence, "bold")]
    if explained.next_step:
        explanation.append(literal_text(explained.next_step))
    return Group(head, requested, *explanation, Text(), table, Text(), *facts)


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
        yield f"funds hold: {funds_hold_text(timeline, timeline.funds_hold, now)}"
    if timeline.refresh:
        last_error = f", last error: {timeline.refresh.last_error}" if timeline.refresh.last_error else ""
        yield f"refresh {timeline.refresh.refresh_id}: {timeline.refresh.state}{last_error}"
    yield f"fee: {fee_text(timeline)}"
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
    for callback in callbacks_of_outcome(state, delivery):
        condition = f", if {outcome_of_callback(callback)}" if state == PaymentState.WAITING else ""
        verb = "not sent" if delivery.undeliverable else "sent" if delivery.delivered_at else "to be sent"
        yield (
            f"{callback.kind} of task {delivery.task_id}: {callback.task} {verb} to queue {callback.queue} "
            f"as task {callback.task_id}{condition}"
        )


def _unapplied_text(balances: Sequence[BalanceLine]) -> str:
    ids = ", ".join(balance.balance_id for balance in balances)
    verb = "is" if len(balances) == 1 else "are"
    return f"{count_text(len(balances), 'balance')} arrived and {verb} not applied yet: {ids}"


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
