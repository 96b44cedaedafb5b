"""What is known about a payment, and what is said about it to people. The types of `explanations`."""

from dataclasses import dataclass
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
    next_step: str = ""
    """Sentences for support: where to do it, and whether a new job is needed. Empty if nothing is to be done."""

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
    """Detail of a failed payment, for people: the cause where a reason has several."""
    verdict: str | None = None
    """Verdict of a released payment."""
    refresh: RefreshState | None = None
    """State of the refresh that serves or served the payment. None if there is none."""
    has_call: bool = False
    """Whether a call was made that may have been accepted, so that the payment has a share of its fee."""
    is_deferred: bool = False
    """Whether a call of the refresh was provably not accepted, so that it is made again."""
    is_overdue: bool = False
    """Whether the payment still waits although its deadline has passed."""
    has_unapplied_balance: bool = False
    """Whether a balance has arrived while the payment waits, and is not applied yet."""
    has_old_balance: bool = False
    """Whether a balance arrived in time that was too old for the payment."""
    has_late_balance: bool = False
    """Whether a balance arrived after the deadline of the payment."""
    is_undelivered: bool = False
    """Whether the outcome of a resolved payment is still to be delivered."""
    is_undeliverable: bool = False
    """Whether the delivery of the outcome to a task was given up."""
    has_open_hold: bool = False
    """Whether the funds hold lasts until after the outcome is delivered."""
