"""What a ledger lacks that lost its last commits, as Redis and the provider show it. Pure: no I/O.

Redis continues while PostgreSQL fails over. It has results of tasks, calls in flight and the newest balances, so it
knows more than a standby that lost the last commits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from worker.correlation.store import AccountState
from worker.errors import FailureReason
from worker.ledger.failover_queries import RegisteredPayment
from worker.rules.states import PaymentState
from worker.rules.times import utc_text

OVERDUE_AFTER = timedelta(seconds=60)
"""Time after its deadline in which a payment of a working deployment is resolved. Results of two deployments may be in
one Redis, so a task that still waits is not ended before."""


class ResultState(StrEnum):
    """State of a stored result of `payments.initiate`."""

    WAITING = "waiting"
    RELEASED = "released"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class StoredResult:
    """A result of the task `payments.initiate` in the result backend."""

    task_id: str
    state: ResultState
    at: datetime
    """When the outcome was stored. The deadline of a waiting payment."""
    outcome: Mapping[str, Any] = field(default_factory=dict)
    """The outcome of a released payment; `reason` and `detail` of a failed one."""
    account_id: str | None = None
    """Account of a waiting payment."""


class FindingKind(StrEnum):
    """What the ledger lacks."""

    LOST_PAYMENT = "lost_payment"
    """A task is suspended, and the ledger has no payment for it: it would wait for ever."""
    LOST_OUTCOME = "lost_outcome"
    """An outcome was delivered, and the ledger has no payment for the task."""
    LOST_RESOLUTION = "lost_resolution"
    """An outcome was delivered, and the ledger's payment is still waiting: it would get another outcome."""
    CONTRADICTION = "contradiction"
    """An outcome was delivered, and the ledger's payment got the opposite one later."""
    LOST_CALL = "lost_call"
    """A call was about to be made, and the ledger has no fee entry for it."""
    LOST_BALANCE = "lost_balance"
    """A REFRESH balance was received, or the provider has one, and the ledger does not have it."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that the ledger lacks."""

    kind: FindingKind
    detail: str
    """What was found, in a sentence."""
    decision: str | None = None
    """What a person must do. None if `--apply` closes it."""
    is_closed: bool = False
    """Whether this run has closed it."""
    task_id: str | None = None
    payment_id: str | None = None
    account_id: str | None = None
    refresh_id: str | None = None
    called_at: datetime | None = None
    balance_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class LedgerView:
    """What the ledger knows of the results, calls and balances."""

    payments: Mapping[str, RegisteredPayment]
    """Payments by task."""
    call_times: Mapping[str, set[datetime]]
    """Times of the calls that have a fee entry, by refresh."""
    balance_ids: set[str]


def findings_of_results(results: Sequence[StoredResult], ledger: LedgerView, now: datetime) -> Iterator[Finding]:
    """Yield what the results show that the ledger does not have."""
    for result in results:
        finding = _finding_of_result(result, ledger.payments.get(result.task_id), now)
        if finding is not None:
            yield finding


def _finding_of_result(result: StoredResult, payment: RegisteredPayment | None, now: datetime) -> Finding | None:
    if result.state == ResultState.WAITING:
        return None if payment else _lost_payment(result, now)
    if payment is None:
        return _lost_outcome(result)
    if payment.state == PaymentState.WAITING:
        return Finding(
            kind=FindingKind.LOST_RESOLUTION,
            detail=f"{_outcome_text(result)} was delivered at {utc_text(result.at)}, and the payment is still waiting",
            task_id=result.task_id,
            payment_id=payment.payment_id,
        )
    if payment.state.value != result.state.value:
        return Finding(
            kind=FindingKind.CONTRADICTION,
            detail=f"{_outcome_text(result)} was delivered at {utc_text(result.at)}; the ledger has "
            f"{payment.state}{f' ({payment.reason})' if payment.reason else ''}",
            decision="find out which outcome the payments service has acted on; execute the payment at most once",
            task_id=result.task_id,
            payment_id=payment.payment_id,
        )
    return None


def _lost_payment(result: StoredResult, now: datetime) -> Finding:
    closable_at = result.at + OVERDUE_AFTER
    return Finding(
        kind=FindingKind.LOST_PAYMENT,
        detail=f"the task waits until {utc_text(result.at)} for a payment that the ledger does not have",
        decision=None if closable_at <= now else f"run the command again after {utc_text(closable_at)}",
        task_id=result.task_id,
        account_id=result.account_id,
    )


def _lost_outcome(result: StoredResult) -> Finding:
    released = result.state == ResultState.RELEASED
    return Finding(
        kind=FindingKind.LOST_OUTCOME,
        detail=f"{_outcome_text(result)} was delivered at {utc_text(result.at)}, and the ledger has no such payment",
        decision="never send its job again; its amount is deducted from no later balance"
        if released
        else "send no job with its payment id again: it might be released now",
        task_id=result.task_id,
        payment_id=result.outcome.get("payment_id"),
    )


def _outcome_text(result: StoredResult) -> str:
    return "released" if result.state == ResultState.RELEASED else f"failed ({result.outcome.get('reason')})"


def findings_of_accounts(
    accounts: Mapping[str, AccountState], ledger: LedgerView, since: datetime
) -> Iterator[Finding]:
    """Yield the calls and balances of the correlation store since then that the ledger does not have."""
    for account_id, state in accounts.items():
        refresh_id, called_at, balance = state.in_flight, state.called_at, state.newest_balance
        if (
            refresh_id is not None
            and called_at is not None
            and called_at >= since
            and called_at not in ledger.call_times.get(refresh_id, ())
        ):
            yield _lost_call(account_id, refresh_id, called_at)
        if balance is not None and balance.at >= since and balance.balance_id not in ledger.balance_ids:
            yield lost_balance(account_id, balance.balance_id, balance.at, "Redis")


def _lost_call(account_id: str, refresh_id: str, called_at: datetime) -> Finding:
    return Finding(
        kind=FindingKind.LOST_CALL,
        detail=f"a call of {utc_text(called_at)} has no fee entry; the provider may have billed it",
        account_id=account_id,
        refresh_id=refresh_id,
        called_at=called_at,
    )


def lost_balance(account_id: str, balance_id: str, at: datetime, known_to: str) -> Finding:
    """Return the finding of a REFRESH balance that only Redis or the provider has."""
    return Finding(
        kind=FindingKind.LOST_BALANCE,
        detail=f"{known_to} has a REFRESH balance as of {utc_text(at)}; the call that caused it may have no fee entry",
        decision="compare the month's invoice: payready fees reconcile",
        account_id=account_id,
        balance_id=balance_id,
    )


def is_failure_reason(reason: object) -> bool:
    """Return whether a failed result is that of a payment. A conflict refuses a job, and leaves its payment alone."""
    return reason in set(FailureReason) - {FailureReason.CONFLICT}
