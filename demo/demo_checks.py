"""Checks of the demo, as pure functions: the plan and the observed results in, failures out.

The observations come from three independent sources: the payments service's journal, payready's ledger, and the
simulator's log.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from demo.demo_plan import CallCountsByFeeState, DemoJob
from worker.ledger.payment_report import PaymentLine
from worker.rules.pricing import EntryState


@dataclass(frozen=True, kw_only=True)
class BacklogCounts:
    """Unfinished work in the ledger."""

    waiting: int
    """Payments in state `waiting`."""
    undelivered: int
    """Outcomes."""
    unapplied: int
    """Balances."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Results of a run."""

    journal: Sequence[Mapping[str, Any]]
    """One entry for each callback that ran at the payments service."""
    payments: Mapping[str, PaymentLine]
    """The ledger's payments by id."""
    calls: Mapping[str, Counter[EntryState]]
    """The ledger's calls by account and state of the fee entry."""
    accepted: Mapping[str, int]
    """Calls that the simulator accepted, by account. The real provider would charge these."""
    backlog: BacklogCounts


@dataclass(kw_only=True)
class DemoCheck:
    """A rule, the number of cases that it was checked for, and its failures."""

    rule: str
    cases: int
    failures: list[str] = field(default_factory=list)


def run_checks(
    jobs: Sequence[DemoJob], expected_calls: Mapping[str, CallCountsByFeeState], observed: Observed
) -> list[DemoCheck]:
    """Compare the observed results with the expected ones."""
    return [
        DemoCheck(
            rule="each job's callback ran exactly once",
            cases=len(jobs),
            failures=[*_check_callbacks_match_jobs_one_to_one(jobs, observed)],
        ),
        DemoCheck(
            rule="each outcome and reason is as expected",
            cases=len(jobs),
            failures=[*_check_outcomes_in_journal_and_ledger(jobs, observed)],
        ),
        DemoCheck(
            rule="each payment's fee share is as expected",
            cases=len(jobs),
            failures=[*_check_fee_shares_and_outcome_fees(jobs, observed)],
        ),
        DemoCheck(
            rule="fee entries equal the calls the provider accepted",
            cases=len(expected_calls),
            failures=[*_check_calls_of_ledger_and_provider(expected_calls, observed)],
        ),
        _check_fee_share_sums_by_refresh(observed),
        DemoCheck(
            rule="no payment is waiting, no outcome undelivered, no balance unapplied",
            cases=1,
            failures=[*_check_backlog(observed.backlog)],
        ),
    ]


def all_callbacks_ran_and_no_backlog(jobs: Sequence[DemoJob], observed: Observed) -> bool:
    """Return whether the run is complete: each job had its callback, and the ledger has no backlog."""
    journaled = {entry["job"] for entry in observed.journal}
    return journaled == {job.name for job in jobs} and not any(_check_backlog(observed.backlog))


def _check_callbacks_match_jobs_one_to_one(jobs: Sequence[DemoJob], observed: Observed) -> Iterable[str]:
    counts = Counter(entry["job"] for entry in observed.journal)
    for job in jobs:
        if counts[job.name] != 1:
            yield f"{job.name}: its callback ran {counts[job.name]} times"
    for unknown in sorted(counts.keys() - {job.name for job in jobs}):
        yield f"{unknown}: a callback for a job that was not sent"


def _check_outcomes_in_journal_and_ledger(jobs: Sequence[DemoJob], observed: Observed) -> Iterable[str]:
    journal = {entry["job"]: (entry["state"], entry["reason"]) for entry in observed.journal}
    for job in jobs:
        expected = ("released" if job.expected.state == "released" else "failed", job.expected.reason)
        if journal.get(job.name, expected) != expected:
            yield f"{job.name}: the service received {_outcome(journal[job.name])}, expected {_outcome(expected)}"
        line = observed.payments.get(job.payment_id)
        if job.expected.state == "rejected":
            if line is not None and not _shares_payment_id_with_accepted_job(job, jobs):
                yield f"{job.name}: the job must be rejected, but the ledger has a payment"
        elif line is None:
            yield f"{job.name}: the ledger has no payment"
        elif (line.state.value, line.verdict_or_reason) != expected:
            recorded = (line.state.value, line.verdict_or_reason or "no reason")
            yield f"{job.name}: the ledger has {_outcome(recorded)}, expected {_outcome(expected)}"


def _outcome(state_and_reason: tuple[str, str]) -> str:
    return ": ".join(state_and_reason)


def _shares_payment_id_with_accepted_job(job: DemoJob, jobs: Sequence[DemoJob]) -> bool:
    return any(other.payment_id == job.payment_id and other.expected.state != "rejected" for other in jobs)


def _check_fee_shares_and_outcome_fees(jobs: Sequence[DemoJob], observed: Observed) -> Iterable[str]:
    outcomes = {entry["job"]: entry["outcome"] for entry in observed.journal if entry.get("outcome")}
    for job in jobs:
        line, outcome = observed.payments.get(job.payment_id), outcomes.get(job.name)
        if job.expected.state == "rejected" or line is None:
            continue
        fee = "reused" if line.reused else line.fee.state.value if line.fee else None
        if fee != job.expected.fee:
            yield f"{job.name}: its fee is {fee} in the ledger, expected {job.expected.fee}"
        if line.fee and line.fee.shared_by != job.expected.shared_by:
            yield f"{job.name}: shared by {line.fee.shared_by}, expected {job.expected.shared_by}"
        if outcome and Decimal(outcome["fee"]["amount"]) != (line.fee.amount if line.fee else 0):
            yield f"{job.name}: the fee of its outcome differs from the ledger's"


def _check_calls_of_ledger_and_provider(
    expected_calls: Mapping[str, CallCountsByFeeState], observed: Observed
) -> Iterable[str]:
    for account_id in sorted({*expected_calls, *observed.calls, *observed.accepted}):
        entries, expected = (
            observed.calls.get(account_id, Counter()),
            expected_calls.get(account_id, CallCountsByFeeState()),
        )
        recorded = CallCountsByFeeState(
            posted=entries[EntryState.POSTED], pending=entries[EntryState.PENDING], void=entries[EntryState.VOID]
        )
        if recorded != expected:
            yield f"{account_id}: the ledger has {recorded} calls, expected {expected}"
        accepted = observed.accepted.get(account_id, 0)
        if not recorded.posted <= accepted <= recorded.posted + recorded.pending:
            yield f"{account_id}: calls accepted by the provider: {accepted}, in the ledger: {recorded}"


def _check_fee_share_sums_by_refresh(observed: Observed) -> DemoCheck:
    """Compare the sum of each refresh's fee shares with the price of its calls."""
    sums: dict[str, Decimal] = {}
    totals: dict[str, Decimal] = {}
    for line in observed.payments.values():
        if line.refresh_id and line.fee:
            sums[line.refresh_id] = sums.get(line.refresh_id, Decimal(0)) + line.fee.amount
            totals[line.refresh_id] = line.fee.total
    failures = [
        f"{refresh_id}: shares of {sums[refresh_id]} for calls of {totals[refresh_id]}"
        for refresh_id in sums
        if sums[refresh_id] != totals[refresh_id]
    ]
    return DemoCheck(rule="the fee shares of each refresh add up to its calls", cases=len(sums), failures=failures)


def _check_backlog(backlog: BacklogCounts) -> Iterable[str]:
    for kind, count in (
        ("waiting payments", backlog.waiting),
        ("undelivered outcomes", backlog.undelivered),
        ("unapplied balances", backlog.unapplied),
    ):
        if count:
            yield f"{kind}: {count}"
