"""Why a payment failed, which party must act, and the next step, for each failure reason. Pure: no I/O, no clock.

The reasons are those of `docs/reference/failure-reasons.md`, and a test compares the two. Where a reason has several
causes, the outcome's detail says which it was.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from worker.errors import FailureReason
from worker.rules.fee_caps import CAP_REACHED
from worker.rules.payment_situations import Actor, Explanation, PaymentSituation
from worker.rules.states import RefreshState

PAYMENT_IS_OVER = "This payment was not released: no money moved for it, and its payment id cannot be used again."
"""What is true of every failed payment."""
_NEW_JOB = "ask the payments service to send a new job with a new payment id"
_RECONNECT = (
    "The payer connects the account again in the product where it was connected first. "
    f"When it is connected, {_NEW_JOB}."
)

FAILURES: Mapping[FailureReason, Explanation] = {
    FailureReason.TIMEOUT: Explanation(
        happened="The payment failed because no fresh balance arrived by its deadline",
        actor=Actor.US,
        action="send a new job",
        next_step=(
            f"{_NEW_JOB[0].upper()}{_NEW_JOB[1:]}; it may cost a fee again. "
            "If it fails too, ask an operator to follow docs/runbooks/payments-time-out.md, which finds the cause."
        ),
    ),
    FailureReason.INSUFFICIENT_FUNDS: Explanation(
        happened="The payment failed because the payer's available funds do not cover it",
        actor=Actor.PAYER,
        action="add funds to the account, or pay in another way",
        next_step=f"When the payer has added funds or chosen another account, {_NEW_JOB}.",
    ),
    FailureReason.FUNDS_UNKNOWN: Explanation(
        happened=(
            "The payment failed because the bank reports no available balance, "
            "and its job requires one (funds_check: required)"
        ),
        actor=Actor.US,
        action="decide whether to pay without a known balance",
        next_step=(
            "The team of the payments service decides. "
            f"If yes, {_NEW_JOB} and funds_check: enabled. It checks the balance if the bank reports one; if not, "
            "it releases the payment unchecked, and the bank may return the debit. "
            "If no, the payer chooses another account, and the new job is for that one."
        ),
    ),
    FailureReason.ACCOUNT_NOT_FOUND: Explanation(
        happened="The payment failed because Quiltt does not know the account (HTTP 404)",
        actor=Actor.US,
        action="check the account id",
        next_step=(
            "Ask the payments service to compare the account id with those at Quiltt, of the same environment. "
            "If it is wrong, ask for a new job with a new payment id and the right account id. "
            "If the account was removed at Quiltt, the payer connects it again before that."
        ),
    ),
    FailureReason.ACCOUNT_UNSUPPORTED: Explanation(
        happened="The payment failed because the account cannot be checked",
        actor=Actor.PAYER,
        action="choose another account",
        next_step=f"When the payer has chosen another account, {_NEW_JOB} for it. With this account it fails again.",
    ),
    FailureReason.CONNECTION_INACTIVE: Explanation(
        happened="The payment failed because Quiltt reports its bank connection as inactive (HTTP 403)",
        actor=Actor.PAYER,
        action="connect the account again",
        next_step=_RECONNECT,
    ),
    FailureReason.CONNECTION_LOST: Explanation(
        happened="The payment failed because the account's bank connection was lost while the payment waited",
        actor=Actor.PAYER,
        action="connect the account again",
        next_step=_RECONNECT,
    ),
    FailureReason.NOT_AUTHORIZED: Explanation(
        happened="The payment failed because Quiltt does not accept our API key",
        actor=Actor.US,
        action="replace PAYREADY_QUILTT_API_KEY",
        next_step=(
            "Ask an operator to follow docs/runbooks/api-key-rejected.md. "
            f"When the page Provider shows accepted calls again, {_NEW_JOB}."
        ),
    ),
    FailureReason.PROVIDER_UNAVAILABLE: Explanation(
        happened="The payment failed because the calls to Quiltt failed until its deadline",
        actor=Actor.QUILTT,
        action="accept calls again",
        next_step=(
            "Ask an operator to follow docs/runbooks/provider-unavailable.md. "
            f"When the page Provider shows accepted calls again, {_NEW_JOB}."
        ),
    ),
    FailureReason.FEE_CAP_REACHED: Explanation(
        happened="The payment failed because our own limit on calls or fees leaves no room for one more call",
        actor=Actor.US,
        action="raise the limit, or wait until its next period",
        next_step=(
            "Ask an operator to follow docs/runbooks/fee-cap-reached.md, or wait until the next period begins. "
            f"A new job before that fails too. Then {_NEW_JOB}."
        ),
    ),
    FailureReason.CONFLICT: Explanation(
        happened="The job was rejected because its payment id was already used for another job",
        actor=Actor.US,
        action="send the job with a new payment id",
        next_step="The payment of the earlier job is not changed.",
    ),
    FailureReason.CANCELLED: Explanation(
        happened="The payment failed because it was cancelled",
        actor=Actor.NONE,
        next_step=f"To pay after all, {_NEW_JOB}.",
    ),
}
"""The explanation of each failure reason without its detail."""


def explain_failed(situation: PaymentSituation) -> Explanation:
    """Return why this payment failed. Requires a situation with a reason."""
    reason = FailureReason(situation.reason or "")
    explained = FAILURES[reason]
    if specify := _SPECIFIC.get(reason):
        explained = specify(explained, situation)
    if reason == FailureReason.CONFLICT:
        return explained
    return replace(explained, next_step=f"{explained.next_step} {PAYMENT_IS_OVER}")


# --- reasons with several causes --------------------------------------------------------------------------------------


def _timeout(explained: Explanation, situation: PaymentSituation) -> Explanation:
    if situation.has_old_balance:
        return replace(explained, happened="The payment failed because the balance that arrived was too old for it")
    if situation.has_late_balance:
        return replace(explained, happened="The payment failed because its balance arrived only after its deadline")
    if not situation.has_call and situation.refresh in (None, RefreshState.REQUESTED, RefreshState.ABANDONED):
        return replace(
            explained,
            happened="The payment failed because no call to Quiltt was made by its deadline",
            action="find out why no call was made",
            next_step=(
                "Ask an operator to follow docs/runbooks/calls-not-made.md. "
                f"When the page Provider shows accepted calls again, {_NEW_JOB}."
            ),
        )
    if situation.refresh == RefreshState.UNCERTAIN:
        cause = "the response to its call to Quiltt was lost, and no balance arrived by its deadline"
        return replace(explained, happened=f"The payment failed because {cause}")
    if situation.refresh in (RefreshState.ACCEPTED, RefreshState.UNANSWERED):
        cause = "Quiltt accepted its call, but no balance arrived by its deadline"
        return replace(explained, happened=f"The payment failed because {cause}")
    return explained


def _insufficient_funds(explained: Explanation, situation: PaymentSituation) -> Explanation:
    next_step = explained.next_step
    if " held for " in situation.detail:
        next_step += (
            " Part of the balance is held for payments that were released before: "
            "if their debits show in the balance already, ask an operator to end their funds holds."
        )
    return replace(explained, happened=_with_detail(explained.happened, situation.detail), next_step=next_step)


def _account_unsupported(explained: Explanation, situation: PaymentSituation) -> Explanation:
    if not situation.detail:
        return explained
    return replace(explained, happened=f"The payment failed because {situation.detail}")


_PAYER_MUST_ACT = re.compile(": the (payer|user) must")
"""Version 0.2.0 wrote `user`."""


def _lost_connection(explained: Explanation, situation: PaymentSituation) -> Explanation:
    """Return the party that the detail names: Quiltt's events say whether the payer must act."""
    detail = situation.detail
    if not detail:
        return explained
    for_payer = _PAYER_MUST_ACT.search(detail)
    reported = detail[: for_payer.start()] if for_payer else detail
    explained = replace(explained, happened=_with_detail(explained.happened, reported))
    if for_payer:
        return explained
    if "deleted" in detail:
        return replace(
            explained,
            actor=Actor.US,
            action="ask the payer to connect an account again",
            next_step=f"When the payer has connected an account, {_NEW_JOB} for that account.",
        )
    return replace(
        explained,
        actor=Actor.QUILTT,
        action="restore the connection",
        next_step=f"When Quiltt's dashboard shows the connection as active again, {_NEW_JOB}.",
    )


def _not_authorized(explained: Explanation, situation: PaymentSituation) -> Explanation:
    if "PAYREADY_ALLOW_PRODUCTION_KEY" not in situation.detail:
        return explained
    return replace(
        explained,
        happened="The payment failed because this deployment may not use its API key, which is a production key",
        action="set PAYREADY_QUILTT_API_KEY to a key of a test environment",
        next_step=(
            "Ask an operator for it, or to set PAYREADY_ALLOW_PRODUCTION_KEY if the deployment is meant to make calls "
            f"that are billed. After that, {_NEW_JOB}."
        ),
    )


_BREAKER_IS_OPEN = "calls to Quiltt fail; "
_CAUSES_AT_QUILTT = ("Quiltt", "no response from ", _BREAKER_IS_OPEN, "the provider ", "provider calls fail")
"""How a detail begins that names Quiltt as the cause. Version 0.2.0 wrote the last two."""


def _provider_unavailable(explained: Explanation, situation: PaymentSituation) -> Explanation:
    detail = situation.detail
    if detail and not detail.startswith(_CAUSES_AT_QUILTT):
        explained = replace(explained, actor=Actor.US, action="find out why the calls failed")
        if detail.startswith("no connection to Quiltt"):
            explained = replace(explained, action="find out whether our network or Quiltt fails")
    if "no call is made before" in detail:
        pause = detail.removeprefix(_BREAKER_IS_OPEN)
        happened = f"The payment failed because calls to Quiltt fail, and the circuit breaker stops them: {pause}"
    elif "not documented" in detail:
        happened = f"The payment failed because Quiltt rejected its call: {detail}"
    else:
        happened = _with_detail(explained.happened, detail)
    return replace(explained, happened=happened)


def _fee_cap_reached(explained: Explanation, situation: PaymentSituation) -> Explanation:
    usage = situation.detail.removeprefix(CAP_REACHED)
    next_step = explained.next_step
    if "per account" in usage:
        next_step += " The other payments of the account on that day show what used the limit."
    return replace(explained, happened=_with_detail(explained.happened, usage), next_step=next_step)


def _cancelled(explained: Explanation, situation: PaymentSituation) -> Explanation:
    return replace(explained, happened=_with_detail(explained.happened, situation.detail))


def _with_detail(happened: str, detail: str) -> str:
    return f"{happened}: {detail}" if detail else happened


_SPECIFIC: Mapping[FailureReason, Callable[[Explanation, PaymentSituation], Explanation]] = {
    FailureReason.TIMEOUT: _timeout,
    FailureReason.INSUFFICIENT_FUNDS: _insufficient_funds,
    FailureReason.ACCOUNT_UNSUPPORTED: _account_unsupported,
    FailureReason.CONNECTION_LOST: _lost_connection,
    FailureReason.NOT_AUTHORIZED: _not_authorized,
    FailureReason.PROVIDER_UNAVAILABLE: _provider_unavailable,
    FailureReason.FEE_CAP_REACHED: _fee_cap_reached,
    FailureReason.CANCELLED: _cancelled,
}
