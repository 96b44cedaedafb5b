"""Actions on a payment: cancel, redeliver, end the funds hold. A page asks before each of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from config.settings import Settings
from dashboard.auditing import audited
from dashboard.page_links import payment_path
from dashboard.page_rendering import render
from dashboard.page_requests import operator_form, require_operator, runtime_of, user_of
from tasks.dispatch import dispatch_leaving_deliveries_to_workers, leave_failures_to_sweep
from worker import flow
from worker.ledger import payment_report
from worker.ledger.column_types import is_storable_text
from worker.ledger.engine import Tx, read_snapshot
from worker.ledger.metrics_queries import set_short_timeout
from worker.ledger.payment_report import PaymentTimeline
from worker.ledger.payment_situation import explain_payment
from worker.rules.states import PaymentState
from worker.runtime import Runtime

RESULT_TEXTS: Mapping[str, str] = {
    "cancelled": "The payment is cancelled. A worker delivers its outcome within seconds.",
    "already_resolved": "Nothing was cancelled: the payment was resolved meanwhile.",
    "redelivery_scheduled": "The outcome is due again. A worker delivers it within seconds.",
    "not_resolved": "Nothing was redelivered: the payment has no outcome yet.",
    "hold_ended": "The funds hold is ended.",
    "no_hold": "Nothing was ended: the funds hold has ended meanwhile.",
}
"""What the page of a payment says after an action, by its result."""


@dataclass(frozen=True, kw_only=True)
class PaymentAction:
    """An action on a payment."""

    title: str
    audit_name: str
    consequences: tuple[str, ...]
    """What happens, for the page that asks."""
    obstacle: Callable[[PaymentTimeline, datetime], str | None]
    """Returns why the action is not possible now, or None."""
    do: Callable[[Runtime, str], str]
    """Returns a result, a key of `RESULT_TEXTS`."""


def read_timeline(tx: Tx, settings: Settings, payment_id: str) -> PaymentTimeline | None:
    """Return all that the ledger has about a payment; None if it has no such payment."""
    if not is_storable_text(payment_id):
        return None
    return payment_report.payment_timeline(
        tx,
        payment_id,
        clock_skew=settings.clock_skew,
        default_hold_s=settings.funds_hold_s,
        callback_queue=settings.effective_callback_queue,
        name_prefix=settings.name_prefix,
    )


def _cancel(rt: Runtime, payment_id: str) -> str:
    detail = "an operator cancelled it on the dashboard"
    follow_up = flow.fail_waiting_as_cancelled_with_fee_share(rt, [payment_id], detail=detail)
    with leave_failures_to_sweep(len(follow_up.deliveries)):
        dispatch_leaving_deliveries_to_workers(follow_up)
    return "cancelled" if follow_up.deliveries else "already_resolved"


def _redeliver(rt: Runtime, payment_id: str) -> str:
    return "redelivery_scheduled" if flow.redeliver(rt, payment_id) else "not_resolved"


def _end_hold(rt: Runtime, payment_id: str) -> str:
    return "hold_ended" if flow.end_hold(rt, payment_id) else "no_hold"


def _obstacle_to_cancel(timeline: PaymentTimeline, _now: datetime) -> str | None:
    state = timeline.payment.state
    return None if state == PaymentState.WAITING else f"it is already resolved: {state}"


def _obstacle_to_redeliver(timeline: PaymentTimeline, _now: datetime) -> str | None:
    return "it waits, and has no outcome yet" if timeline.payment.state == PaymentState.WAITING else None


def _obstacle_to_end_hold(timeline: PaymentTimeline, now: datetime) -> str | None:
    hold = timeline.funds_hold
    if hold is None:
        return "it has no funds hold: it is not released, or its job has no amount"
    return "its funds hold has ended" if hold.until is not None and hold.until <= now else None


ACTIONS: Mapping[str, PaymentAction] = {
    "cancel": PaymentAction(
        title="Cancel the payment",
        audit_name="payment.cancel",
        consequences=(
            "The payment fails with the reason cancelled, and its payments service gets this outcome.",
            "A call to Quiltt that was already made is billed as usual.",
            "This cannot be undone. To pay after all, the payments service sends a new job with a new payment id.",
        ),
        obstacle=_obstacle_to_cancel,
        do=_cancel,
    ),
    "redeliver": PaymentAction(
        title="Redeliver the outcome",
        audit_name="payment.redeliver",
        consequences=(
            "Each task of the payment gets the same outcome once more, under the same task id.",
            "A failed payment stays failed: this does not try it again.",
            "Its callbacks are sent again, with their task ids.",
            "The payments service must recognise the repetition. Otherwise it may pay twice.",
            "A funds hold is open again until the outcome is delivered.",
        ),
        obstacle=_obstacle_to_redeliver,
        do=_redeliver,
    ),
    "end-hold": PaymentAction(
        title="End the funds hold",
        audit_name="payment.end_hold",
        consequences=(
            "The amount is not deducted any more from balances as of now or later.",
            "Do it only if the debit shows in the balance of the account, or will not be made.",
            "Otherwise another payment may be released on the same money.",
        ),
        obstacle=_obstacle_to_end_hold,
        do=_end_hold,
    ),
}


def _action_of(request: Request) -> PaymentAction:
    action = ACTIONS.get(request.path_params["action"])
    if action is None:
        raise HTTPException(404, "there is no such action on a payment")
    return action


def ask_before_action(request: Request) -> Response:
    """Show what an action on a payment does, with the button that does it."""
    require_operator(request)
    action, payment_id = _action_of(request), request.query_params.get("payment_id", "")
    rt = runtime_of(request)
    now = rt.clock()
    timeline = _read_existing(rt, payment_id)
    obstacle = action.obstacle(timeline, now)
    return render(
        request,
        "payment_action.html",
        status_code=409 if obstacle else 200,
        action=action,
        line=timeline.payment,
        timeline=timeline,
        sentence=explain_payment(timeline, now).sentence,
        obstacle=obstacle,
    )


def _read_existing(rt: Runtime, payment_id: str) -> PaymentTimeline:
    with read_snapshot(rt.engine) as tx:
        set_short_timeout(tx)
        timeline = read_timeline(tx, rt.settings, payment_id)
    if timeline is None:
        raise HTTPException(404, "the ledger has no payment with this id")
    return timeline


async def act(request: Request) -> Response:
    """Do an action on a payment, and redirect to the page of the payment with the result."""
    action, form = _action_of(request), await operator_form(request)
    payment_id = str(form.get("payment_id", ""))
    rt, user = runtime_of(request), user_of(request)

    def act_on_existing() -> str:
        _read_existing(rt, payment_id)
        return audited(rt, user, action=action.audit_name, subject=payment_id, do=lambda: action.do(rt, payment_id))

    result = await run_in_threadpool(act_on_existing)
    path = payment_path(payment_id)
    return RedirectResponse(f"{path}{'&' if '?' in path else '?'}result={result}", status_code=303)


ROUTES = [
    Route("/payment-actions/{action}", ask_before_action),
    Route("/payment-actions/{action}", act, methods=["POST"]),
]
