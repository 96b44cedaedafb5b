"""The page of a payment: what happened, which party must act, and all that the ledger has about it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, localcontext
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dashboard.page_links import flower_task_url, payment_action_path
from dashboard.page_rendering import render
from dashboard.page_requests import runtime_of
from dashboard.pages.payment_action_page import ACTIONS, RESULT_TEXTS, read_timeline
from dashboard.payment_chart import TimelinePicture, Wait, draw_timeline, offset_text
from worker.ledger import archived_months
from worker.ledger.balance_report import MAX_BALANCES, BalanceLine
from worker.ledger.column_types import is_storable_text
from worker.ledger.engine import read_snapshot
from worker.ledger.metrics_queries import set_short_timeout
from worker.ledger.payment_history import (
    TimelineEvent,
    callbacks_of_outcome,
    charge_text,
    deadline_event,
    evidence_text,
    fee_text,
    funds_hold_text,
    outcome_of_callback,
    timeline_events,
)
from worker.ledger.payment_report import PaymentTimeline
from worker.ledger.payment_situation import explain_payment
from worker.rules.decimals import amount_with_currency_text, count_text
from worker.rules.funds import EXACT_CONTEXT
from worker.rules.job import default_funds_check
from worker.rules.payment_situations import Actor
from worker.rules.pricing import EntryState
from worker.rules.states import PaymentState

METADATA_IN_HEAD = 6
"""Metadata that stand above the timeline. If there are more, a section below has all."""
ACTOR_TEXTS: Mapping[Actor, tuple[str, str]] = {
    Actor.PAYER: ("The payer must act", "warn"),
    Actor.US: ("We must act", "bad"),
    Actor.QUILTT: ("Quiltt must act", "warn"),
    Actor.NONE: ("No action needed", "good"),
}
"""The badge of the party that must act: its text and its class."""


@dataclass(frozen=True, kw_only=True)
class FundsRow:
    """A line of the funds calculation, as on a bill."""

    label: str
    amount: str
    is_sum: bool = False


@dataclass(frozen=True, kw_only=True)
class BalanceRow:
    """A balance that concerns the payment, and what it did."""

    balance: BalanceLine
    effect: str
    detail: str = ""


def show_payment(request: Request) -> Response:
    """Show a payment. If the ledger does not have it, show where it is."""
    payment_id = request.path_params["payment_id"] or request.query_params.get("id", "")
    rt = runtime_of(request)
    now = rt.clock()
    with read_snapshot(rt.engine) as tx:
        set_short_timeout(tx)
        timeline = read_timeline(tx, rt.settings, payment_id)
        is_archived = timeline is None and is_storable_text(payment_id)
        archived = archived_months.month_with_payment(tx, payment_id) if is_archived else None
    if timeline is None:
        return render(request, "payment_missing.html", status_code=404, payment_id=payment_id, archived=archived)
    events = _events_with_deadline(timeline)
    explained = explain_payment(timeline, now)
    actor_text, actor_class = ACTOR_TEXTS[explained.actor]
    return render(
        request,
        "payment.html",
        timeline=timeline,
        line=timeline.payment,
        explained=explained,
        actor_text=actor_text,
        actor_class=actor_class,
        result=RESULT_TEXTS.get(request.query_params.get("result", "")),
        actions=[
            (action.title, payment_action_path(name, payment_id))
            for name, action in ACTIONS.items()
            if action.obstacle(timeline, now) is None
        ],
        metadata=timeline.job.get("metadata", {}),
        metadata_in_head=METADATA_IN_HEAD,
        events=events,
        picture=_picture(timeline, events, now),
        offset=lambda at: offset_text(at - timeline.payment.requested_at),
        funds=funds_rows(timeline.funds_calculation),
        balances=_balance_rows(timeline),
        max_balances=MAX_BALANCES,
        fee=fee_text(timeline),
        hold=funds_hold_text(timeline, timeline.funds_hold, now) if timeline.funds_hold else None,
        evidence=evidence_text,
        charge_text=charge_text,
        default_funds_check=default_funds_check(timeline.payment.amount),
        callbacks=lambda delivery: callbacks_of_outcome(timeline.payment.state, delivery),
        outcome_of_callback=outcome_of_callback,
        flower_url=lambda task_id: flower_task_url(rt.settings, task_id),
        json_text=_json_text,
    )


def _events_with_deadline(timeline: PaymentTimeline) -> list[TimelineEvent]:
    events = timeline_events(timeline)
    if timeline.payment.state != PaymentState.WAITING:
        events = sorted([*events, deadline_event(timeline)], key=lambda event: event.at)
    return events


def _picture(timeline: PaymentTimeline, events: list[TimelineEvent], now: datetime) -> TimelinePicture:
    line = timeline.payment
    delivered = [delivery.delivered_at for delivery in timeline.deliveries]
    wait = Wait(
        requested_at=line.requested_at,
        until=line.resolved_at or now,
        called_at=next((call.called_at for call in timeline.calls if call.state != EntryState.VOID), None),
        has_refused_call=any(call.state == EntryState.VOID for call in timeline.calls),
        balance_at=timeline.balance.received_at if timeline.balance else None,
        delivered_at=max(at for at in delivered if at) if delivered and all(delivered) else None,
        scale_until=line.resolved_at or max(now, line.deadline),
        is_waiting=line.state == PaymentState.WAITING,
        has_rejected_balance=bool(timeline.rejected_balances),
    )
    return draw_timeline(events, wait)


def funds_rows(calculation: Mapping[str, Any] | None) -> list[FundsRow]:
    """Return a funds calculation as lines of a sum: available funds, needed amount, and what is left or missing."""
    if calculation is None:
        return []
    currency = calculation["currency"]

    def row(label: str, value: Any, *, sign: str = "", is_sum: bool = False) -> FundsRow:
        amount = "unknown" if value is None else f"{sign}{amount_with_currency_text(Decimal(value), currency)}"
        return FundsRow(label=label, amount=amount, is_sum=is_sum)

    rows = [row("Available balance that the bank reports", calculation["available"])]
    if calculation.get("limit") is not None:
        rows.append(row("Overdraft limit, which the job includes", calculation["limit"], sign="+ "))
    if calculation.get("held_count"):
        held_for = count_text(calculation["held_count"], "released payment")
        rows.append(row(f"Funds holds of {held_for}{_held_until_text(calculation)}", calculation["held"], sign="- "))
    available = calculation.get("available_after_holds")
    rows.append(row("Available funds", available, is_sum=True))
    needed = calculation["needed"]
    if needed != calculation["amount"]:
        label = f"Needed: amount x {calculation['multiplier']} + {calculation['fixed']}, the buffer of the job"
        rows += [row("Amount of the payment", calculation["amount"]), row(label, needed)]
    else:
        rows.append(row("Needed: amount of the payment", needed))
    if available is not None:
        with localcontext(EXACT_CONTEXT):
            left = Decimal(available) - Decimal(needed)
        rows.append(row("Left" if left >= 0 else "Missing", left if left >= 0 else -left, is_sum=True))
    return rows


def _held_until_text(calculation: Mapping[str, Any]) -> str:
    if "held_until" not in calculation:  # a payment of version 0.2.0
        return ""
    until = calculation["held_until"]
    return f", until {until}" if until else ", one with an outcome that is not delivered yet"


def _balance_rows(timeline: PaymentTimeline) -> list[BalanceRow]:
    """Return the balances in the order of arrival, each once."""
    rows: dict[str, BalanceRow] = {}
    unattributed = "attributed to no call"
    for balance in timeline.unattributed_balances:
        rows[balance.balance_id] = BalanceRow(balance=balance, effect=unattributed)
    for balance in timeline.unapplied_balances:
        rows[balance.balance_id] = BalanceRow(balance=balance, effect="not applied yet")
    for rejected in timeline.rejected_balances:
        detail, balance = rejected.detail, rejected.balance
        if balance.balance_id in rows:
            detail = f"{detail}; {unattributed}"
        rows[balance.balance_id] = BalanceRow(balance=balance, effect=f"rejected: {rejected.reason}", detail=detail)
    if timeline.balance:
        is_unattributed = timeline.balance.balance_id in rows
        rows[timeline.balance.balance_id] = BalanceRow(
            balance=timeline.balance,
            effect="decided the payment",
            detail=unattributed if is_unattributed else "",
        )
    return sorted(rows.values(), key=lambda row: row.balance.received_at)


def _json_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)


ROUTES = [Route("/payments/{payment_id:path}", show_payment)]
