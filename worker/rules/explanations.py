"""One sentence about a payment: what happened, and which party must act now.

The command line prints it. The reasons are those of `docs/reference/failure-reasons.md`, and a test
compares the two. All functions are pure: no I/O, no clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from worker.errors import FailureReason
from worker.rules.states import PaymentState, RefreshState


class Actor(StrEnum):
    """The party that must act now."""

    PAYER = "payer"
    US = "us"
    """The operators of payready and of the payments service."""
    QUILTT = "Quiltt"
    NONE = "none"
    """payready continues by itself, or there is nothing to do."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What happened to a payment, and what its actor must do now."""

    happened: str
    """A main clause without a full stop."""
    actor: Actor
    action: str = ""
    """What the actor must do, as an imperative; what happens by itself without an actor. May be empty without one."""

    @property
    def sentence(self) -> str:
        """The explanation as one sentence in plain words."""
        if self.actor == Actor.NONE:
            return f"{self.happened}; {self.action or 'no action is needed'}."
        subject = {Actor.PAYER: "the payer", Actor.US: "we", Actor.QUILTT: "Quiltt"}[self.actor]
        return f"{self.happened}; {subject} must act: {self.action}."


@dataclass(frozen=True, kw_only=True)
class PaymentSituation:
    """What the ledger knows about a payment, as far as the explanation depends on it."""

    state: PaymentState
    reason: FailureReason | None = None
    """Failure reason of a failed payment."""
    detail: str = ""
    """Detail of a failed payment, for people."""
    verdict: str | None = None
    """Verdict of a released payment."""
    refresh: RefreshState | None = None
    """State of the refresh that serves or served the payment. None if there is none."""
    is_deferred: bool = False
    """Whether a call of the refresh was provably not accepted, so that it is made again."""
    is_overdue: bool = False
    """Whether the payment still waits although its deadline has passed."""
    has_unapplied_balance: bool = False
    """Whether a balance has arrived while the payment waits, and is not applied yet."""
    has_old_balance: bool = False
    """Whether a balance arrived that was too old for the payment, or came after its deadline."""
    is_undelivered: bool = False
    """Whether the outcome of a resolved payment is still to be delivered."""
    is_undeliverable: bool = False
    """Whether the delivery of the outcome to a task was given up."""
    has_open_hold: bool = False
    """Whether the funds hold lasts until after the outcome is delivered."""
    has_pending_call: bool = False
    """Whether it is unknown if Quiltt bills a call that was made for the payment."""


_NEW_JOB = "send a new job with a new payment id"

FAILURES: Mapping[FailureReason, Explanation] = {
    FailureReason.TIMEOUT: Explanation(
        happened="The payment failed because no fresh balance arrived by its deadline",
        actor=Actor.US,
        action=f"{_NEW_JOB}, and check the webhook and the calls if it fails again",
    ),
    FailureReason.INSUFFICIENT_FUNDS: Explanation(
        happened="The payment failed because the payer's available funds do not cover it",
        actor=Actor.PAYER,
        action="add funds to the account, or pay in another way",
    ),
    FailureReason.FUNDS_UNKNOWN: Explanation(
        happened="The payment failed because the bank reports no available amount, and its job requires a funds check",
        actor=Actor.US,
        action="decide whether to send a new job with `funds_check: enabled`",
    ),
    FailureReason.ACCOUNT_NOT_FOUND: Explanation(
        happened="The payment failed because Quiltt does not know the account",
        actor=Actor.US,
        action="correct the account id in a new job",
    ),
    FailureReason.ACCOUNT_UNSUPPORTED: Explanation(
        happened="The payment failed because the account cannot be checked: its kind or its currency does not fit",
        actor=Actor.PAYER,
        action="choose another account",
    ),
    FailureReason.CONNECTION_INACTIVE: Explanation(
        happened="The payment failed because the bank connection of the account is inactive",
        actor=Actor.PAYER,
        action="connect the account again",
    ),
    FailureReason.CONNECTION_LOST: Explanation(
        happened="The payment failed because the bank connection of the account was lost while it waited",
        actor=Actor.PAYER,
        action="connect the account again",
    ),
    FailureReason.NOT_AUTHORIZED: Explanation(
        happened="The payment failed because Quiltt rejects our API key, or this deployment may not use it",
        actor=Actor.US,
        action="correct PAYREADY_QUILTT_API_KEY",
    ),
    FailureReason.PROVIDER_UNAVAILABLE: Explanation(
        happened="The payment failed because the calls to Quiltt failed until its deadline, or could not be made",
        actor=Actor.QUILTT,
        action="recover; later we send a new job with a new payment id",
    ),
    FailureReason.FEE_CAP_REACHED: Explanation(
        happened="The payment failed because a fee cap left no room for one more call",
        actor=Actor.US,
        action="raise the fee cap, or wait for its next period",
    ),
    FailureReason.CONFLICT: Explanation(
        happened="The job was rejected because its payment id was already used for another job",
        actor=Actor.US,
        action="send the job with a new payment id",
    ),
    FailureReason.CANCELLED: Explanation(
        happened="The payment failed because the payments service cancelled it", actor=Actor.NONE
    ),
}
"""The explanation of each failure reason. Some depend on more than the reason: `explain`."""

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
        return _with_pending_call(_explain_waiting(situation), situation)
    resolved = _explain_failed(situation) if situation.reason else RELEASES[situation.verdict or "not_requested"]
    return _with_delivery(_with_pending_call(resolved, situation), situation)


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


def _explain_failed(situation: PaymentSituation) -> Explanation:
    reason = FailureReason(situation.reason or "")
    explained = FAILURES[reason]
    if reason == FailureReason.CONNECTION_LOST:
        return _explain_lost_connection(explained, situation.detail)
    if reason == FailureReason.TIMEOUT and situation.has_old_balance:
        return replace(
            explained, happened="The payment failed because the balance that arrived was too old, or came too late"
        )
    if reason == FailureReason.TIMEOUT and situation.refresh in (None, RefreshState.REQUESTED, RefreshState.ABANDONED):
        return replace(
            explained,
            happened="The payment failed because no call to Quiltt was made by its deadline",
            action=f"find out why no call was made, then {_NEW_JOB}",
        )
    return explained


def _explain_lost_connection(explained: Explanation, detail: str) -> Explanation:
    """Return the party that the detail names: Quiltt's events say whether the user must act."""
    if "the user must" in detail:
        return explained
    if "deleted" in detail:
        return Explanation(
            happened="The payment failed because the profile of the account was deleted while it waited",
            actor=Actor.US,
            action="ask the payer to connect an account again",
        )
    return replace(explained, actor=Actor.QUILTT, action=f"restore the connection, then we {_NEW_JOB}")


def _with_pending_call(explained: Explanation, situation: PaymentSituation) -> Explanation:
    if not situation.has_pending_call or situation.state == PaymentState.WAITING:
        return explained
    return replace(explained, happened=f"{explained.happened}, and the fee of a call without a response is pending")


def _with_delivery(explained: Explanation, situation: PaymentSituation) -> Explanation:
    """Add to a resolved payment that its payments service does not have the outcome yet."""
    if situation.is_undeliverable:
        return Explanation(
            happened=f"{explained.happened}, and its outcome cannot be delivered",
            actor=Actor.US,
            action="correct the cause, then redeliver the outcome",
        )
    if not situation.is_undelivered:
        return explained
    held = ", which keeps its funds hold open" if situation.has_open_hold else ""
    happened = f"{explained.happened}, and its outcome is not delivered yet{held}"
    return replace(explained, happened=happened, action=explained.action or "payready delivers it within seconds")
