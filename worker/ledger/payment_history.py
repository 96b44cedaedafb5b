"""The history of a payment for people: its events in order of time, and facts as text. It reads no tables itself."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum

from worker.ledger.balance_report import BalanceLine
from worker.ledger.payment_report import CallLine, DeliveryLine, FundsHoldLine, PaymentFee, PaymentTimeline
from worker.rules.callbacks import Callback
from worker.rules.decimals import amount_text, amount_with_currency_text, count_text
from worker.rules.pricing import ACCEPTED_STATUS, EntryState
from worker.rules.states import PaymentState
from worker.rules.times import utc_time_text


class EventKind(StrEnum):
    """What happened at one time of a payment's history."""

    JOB = "job"
    CALL = "call"
    FEE = "fee"
    """The final fee entry of a call."""
    BALANCE = "balance"
    REJECTED_BALANCE = "rejected_balance"
    RESOLUTION = "resolution"
    DEADLINE = "deadline"
    DELIVERY = "delivery"


@dataclass(frozen=True, kw_only=True)
class TimelineEvent:
    """A row of a payment's timeline."""

    at: datetime
    kind: EventKind
    name: str
    detail: str = ""


def timeline_events(timeline: PaymentTimeline) -> list[TimelineEvent]:
    """Return the events of a payment in order of time, and its deadline while it waits."""
    return sorted(_unsorted_events(timeline), key=lambda event: event.at)


def _unsorted_events(timeline: PaymentTimeline) -> Iterator[TimelineEvent]:
    line = timeline.payment
    accepted = _amount_and_timeout_text(timeline)
    yield TimelineEvent(at=line.requested_at, kind=EventKind.JOB, name="job accepted", detail=accepted)
    for call in timeline.calls:
        price = amount_with_currency_text(call.price, call.currency)
        detail = f"{call.call_id}, fee entry pending: {price}"
        yield TimelineEvent(at=call.called_at, kind=EventKind.CALL, name="call", detail=detail)
        if call.finalized_at:
            detail = f"{call.call_id}, {charge_text(call.state)}: {evidence_text(call)}"
            yield TimelineEvent(at=call.finalized_at, kind=EventKind.FEE, name=f"fee {call.state}", detail=detail)
    yield from _balance_events(timeline)
    if line.resolved_at:
        failure_detail = (timeline.outcome or {}).get("detail") if line.state == PaymentState.FAILED else None
        detail = ": ".join(text for text in (line.verdict_or_reason, failure_detail) if text)
        yield TimelineEvent(at=line.resolved_at, kind=EventKind.RESOLUTION, name=line.state.value, detail=detail)
    else:
        yield deadline_event(timeline)
    for delivery in timeline.deliveries:
        if delivery.delivered_at:
            yield TimelineEvent(
                at=delivery.delivered_at,
                kind=EventKind.DELIVERY,
                name="outcome delivered",
                detail=f"to task {delivery.task_id}",
            )


def deadline_event(timeline: PaymentTimeline) -> TimelineEvent:
    """Return the deadline of a payment as an event."""
    return TimelineEvent(at=timeline.payment.deadline, kind=EventKind.DEADLINE, name="deadline")


def _balance_events(timeline: PaymentTimeline) -> Iterator[TimelineEvent]:
    rejected = {line.balance.balance_id for line in timeline.rejected_balances}
    resolving = [timeline.balance] if timeline.balance else []
    unattributed = {line.balance_id: line for line in timeline.unattributed_balances}
    others = [unattributed[key] for key in unattributed.keys() - rejected - {line.balance_id for line in resolving}]
    for balance in (*resolving, *others, *timeline.unapplied_balances):
        detail = _balance_text(timeline, balance)
        yield TimelineEvent(at=balance.received_at, kind=EventKind.BALANCE, name="balance", detail=detail)
    for line in timeline.rejected_balances:
        detail = _balance_text(timeline, line.balance)
        at, kind = line.balance.received_at, EventKind.REJECTED_BALANCE
        yield TimelineEvent(at=at, kind=kind, name="balance rejected", detail=detail)


def _amount_and_timeout_text(timeline: PaymentTimeline) -> str:
    line = timeline.payment
    amount = "no amount" if line.amount is None else amount_with_currency_text(line.amount, line.currency)
    return f"{amount}, timeout {(line.deadline - line.requested_at).total_seconds():.0f} s"


def evidence_text(call: CallLine) -> str:
    """Return what proved the final fee entry of a call, such as `HTTP 202`. Empty while the call is pending."""
    names = {"status": "HTTP", "not_sent": "not sent,"}
    return ", ".join(f"{names.get(key, key)} {value}" for key, value in (call.evidence or {}).items())


def _balance_text(timeline: PaymentTimeline, balance: BalanceLine) -> str:
    currency = timeline.payment.currency
    available = "null" if balance.available is None else amount_text(balance.available, currency)
    text = f"{balance.balance_id}, {balance.event_id}, available {available}, as of {utc_time_text(balance.as_of)}"
    if balance.at != balance.as_of:
        text += f", its own time {utc_time_text(balance.at)}"
    is_unattributed = any(line.balance_id == balance.balance_id for line in timeline.unattributed_balances)
    return f"{text}, attributed to no call" if is_unattributed else text


# --- facts ------------------------------------------------------------------------------------------------------------


def charge_text(state: EntryState) -> str:
    """Return what the state of a call's fee means."""
    return {
        EntryState.PENDING: "not known yet whether Quiltt charges it",
        EntryState.POSTED: "charged to us by Quiltt",
        EntryState.VOID: "not charged by Quiltt",
    }[state]


def fee_text(timeline: PaymentTimeline) -> str:
    """Return what the payment costs, its share of the fees of its calls, and why."""
    line, call = timeline.payment, next(iter(timeline.calls), None)
    if line.reused:
        saved = f", which saved {amount_with_currency_text(call.price, call.currency)}" if call else ""
        return f"none, because it reused the balance of an earlier call{saved}"
    if line.state == PaymentState.WAITING:
        return "known when the payment is resolved"
    if line.fee is None:
        return "none, because no call to Quiltt was made for it"
    if line.fee.state == EntryState.VOID:
        return f"none, because {_free_calls_text(timeline.calls)}"
    return _share_text(line.fee, _charge_of_calls_text(line.fee.state, timeline.calls))


def _charge_of_calls_text(state: EntryState, calls: Sequence[CallLine]) -> str:
    """Return what the state of a refresh's fee means. Pending: that of at least one of its calls is."""
    if state == EntryState.PENDING and any(call.state == EntryState.POSTED for call in calls):
        return "not known yet whether Quiltt charges all calls"
    return f"{charge_text(state)}{_proof_text(calls) if state == EntryState.POSTED else ''}"


def _proof_text(calls: Sequence[CallLine]) -> str:
    """Return what proved that Quiltt charges a call. Empty if that was an invoice."""
    evidence = [call.evidence or {} for call in calls]
    if any(each.get("status") == ACCEPTED_STATUS for each in evidence):
        return ", which accepted the call"
    return ", which sent a balance for the call" if any("balance" in each for each in evidence) else ""


def _free_calls_text(calls: Sequence[CallLine]) -> str:
    """Return why Quiltt does not charge the calls of a refresh. The last one decided the refresh."""
    evidence = (calls[-1].evidence or {}) if calls else {}
    if "not_sent" in evidence:
        return "no call reached Quiltt"
    if "status" in evidence:
        return f"Quiltt does not charge a call that it rejects (HTTP {evidence['status']})"
    return "Quiltt does not charge the call"


def _share_text(fee: PaymentFee, charge: str) -> str:
    amount = f"{amount_with_currency_text(fee.amount, fee.currency)} {fee.state}, {charge}"
    if fee.shared_by == 1:
        return amount
    total = amount_with_currency_text(fee.total, fee.currency)
    return f"{amount}: share of {total} among {count_text(fee.shared_by, 'payment')}"


def funds_hold_text(timeline: PaymentTimeline, hold: FundsHoldLine, now: datetime) -> str:
    """Return the amount of the funds hold of a payment, and its end."""
    line = timeline.payment
    amount = amount_with_currency_text(line.amount or Decimal(0), line.currency)
    if hold.until is None:
        return f"{amount} until {hold.after_delivery_s} s after the outcome is delivered"
    return f"{amount} {'ended' if hold.until <= now else 'until'} {utc_time_text(hold.until)}"


def callbacks_of_outcome(state: PaymentState, delivery: DeliveryLine) -> list[Callback]:
    """Return the callbacks that the outcome of a payment in this state sends: those of both outcomes while it waits."""
    return [
        callback for callback in delivery.callbacks if state in (PaymentState.WAITING, outcome_of_callback(callback))
    ]


def outcome_of_callback(callback: Callback) -> PaymentState:
    """Return the outcome of a payment that sends the callback."""
    return PaymentState.FAILED if callback.kind == "link_error" else PaymentState.RELEASED
