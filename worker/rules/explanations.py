"""One sentence about a payment: what happened, and which party must act now. Then the next step.

The command line and the dashboard show it. All functions are pure: no I/O, no clock.
"""

from collections.abc import Mapping
from dataclasses import replace

from worker.rules.failure_explanations import explain_failed
from worker.rules.payment_situations import Actor, Explanation, PaymentSituation
from worker.rules.states import PaymentState, RefreshState

WAITING: Mapping[RefreshState | None, Explanation] = {
    None: Explanation(
        happened="The payment waits, and no refresh serves it",
        actor=Actor.NONE,
        action="payready requests one within 5 s",
    ),
    RefreshState.REQUESTED: Explanation(
        happened="The payment waits for the call to Quiltt, which is not made yet",
        actor=Actor.NONE,
        action="payready makes it as soon as the rate limit and the circuit breaker allow",
    ),
    RefreshState.CALLING: Explanation(
        happened="The payment waits while payready calls Quiltt",
        actor=Actor.NONE,
        action="payready records the response within seconds",
    ),
    RefreshState.ACCEPTED: Explanation(
        happened="The payment waits for a balance, and Quiltt has accepted the call",
        actor=Actor.QUILTT,
        action="send the balance before the deadline",
    ),
    RefreshState.UNCERTAIN: Explanation(
        happened="The payment waits for a balance, and the response to the call was lost",
        actor=Actor.QUILTT,
        action="send the balance, or payready calls once more",
    ),
    RefreshState.ANSWERED: Explanation(
        happened="The payment waits because the last balance cannot resolve it",
        actor=Actor.NONE,
        action="payready requests a newer balance",
    ),
    RefreshState.REJECTED: Explanation(
        happened="The payment waits, and the last call for it was rejected",
        actor=Actor.NONE,
        action="payready resolves it or calls again within 5 s",
    ),
    RefreshState.UNANSWERED: Explanation(
        happened="The payment waits, and Quiltt sent no balance in the time that a refresh may take",
        actor=Actor.QUILTT,
        action="send the late balance before the deadline",
    ),
    RefreshState.ABANDONED: Explanation(
        happened="The payment waits, and the last refresh of its account was abandoned",
        actor=Actor.NONE,
        action="payready requests a new one within 5 s",
    ),
}
"""The explanation of a waiting payment by the state of the refresh that serves it."""

RELEASES: Mapping[str, Explanation] = {
    "sufficient": Explanation(happened="The payment was released: a fresh balance covers it", actor=Actor.NONE),
    "unchecked": Explanation(
        happened="The payment was released without a funds check: the bank reports no available amount",
        actor=Actor.NONE,
    ),
    "not_requested": Explanation(
        happened="The payment was released: a fresh balance arrived, and its job requests no funds check",
        actor=Actor.NONE,
    ),
}
"""The explanation of a released payment by its verdict."""


def explain(situation: PaymentSituation) -> Explanation:
    """Return what happened to a payment, and which party must act now."""
    if situation.state == PaymentState.WAITING:
        return _explain_waiting(situation)
    resolved = explain_failed(situation) if situation.reason else RELEASES[situation.verdict or "not_requested"]
    return _with_delivery(resolved, situation)


def _explain_waiting(situation: PaymentSituation) -> Explanation:
    if situation.is_overdue:
        return Explanation(
            happened="The payment still waits although its deadline has passed",
            actor=Actor.US,
            action="check that `beat` and `worker` run",
        )
    if situation.has_unapplied_balance:
        return Explanation(
            happened="The payment waits, and a balance has arrived",
            actor=Actor.NONE,
            action="payready applies it within seconds",
        )
    if situation.refresh == RefreshState.REQUESTED and situation.is_deferred:
        return Explanation(
            happened="The payment waits, and Quiltt has not accepted the call yet",
            actor=Actor.QUILTT,
            action="accept the call, which payready repeats until the deadline",
        )
    return WAITING[situation.refresh]


def _with_delivery(explained: Explanation, situation: PaymentSituation) -> Explanation:
    """Add to a resolved payment that its payments service does not have the outcome yet."""
    if situation.is_undeliverable:
        return Explanation(
            happened=f"{explained.happened}, and its outcome cannot be delivered",
            actor=Actor.US,
            action="correct the cause, then redeliver the outcome",
            next_step=f"The payments service does not know the outcome yet. {explained.next_step}".rstrip(),
        )
    if not situation.is_undelivered:
        return explained
    held = ", which keeps its funds hold open" if situation.has_open_hold else ""
    happened = f"{explained.happened}, and its outcome is not delivered yet{held}"
    return replace(explained, happened=happened, action=explained.action or "payready delivers it within seconds")
