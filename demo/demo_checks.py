"""Did everything come out as promised? Pure: the plan and what was seen in, findings out.

Three witnesses are heard: the payments service's journal, payready's ledger, and the simulator's log.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from demo.demo_plan import DemoJob, ExpectedCalls
from worker.ledger.metrics_queries import Backlog
from worker.ledger.payment_report import PaymentLine
from worker.rules.pricing import EntryState


@dataclass(frozen=True)
class Observed:
    """What the witnesses say."""

    journal: Sequence[Mapping[str, Any]]
    """A line for each callback that ran at the payments service."""
    payments: Mapping[str, PaymentLine]
    """The ledger's payments by id."""
    calls: Mapping[str, Counter[EntryState]]
    """The ledger's calls by account, as they stand."""
    accepted: Mapping[str, int]
    """The calls that the provider accepted, by account: what it would charge for."""
    backlog: Backlog


@dataclass
class DemoCheck:
    """One thing that was promised, for how many cases it was looked at, and what was otherwise."""

    rule: str
    cases: int
    failures: list[str] = field(default_factory=list)


def run_checks(
    plan: Sequence[DemoJob], expected_calls: Mapping[str, ExpectedCalls], observed: Observed
) -> list[DemoCheck]:
    """Lay what was seen beside what was promised."""
    return [
        DemoCheck("each job's callback ran exactly once", len(plan), list(_check_callbacks(plan, observed))),
        DemoCheck("each outcome and reason is the one promised", len(plan), list(_check_outcomes(plan, observed))),
        DemoCheck("each payment's fee share is the one promised", len(plan), list(_check_fees(plan, observed))),
        DemoCheck(
            "fee entries equal the calls the provider accepted",
            len(expected_calls),
            list(_check_calls(expected_calls, observed)),
        ),
        DemoCheck("the shares of a refresh's payments add up to its calls", *_check_shares(observed)),
        DemoCheck("nothing is left waiting or undelivered", 1, list(_check_backlog(observed.backlog))),
    ]


def all_resolved(plan: Sequence[DemoJob], observed: Observed) -> bool:
    """Whether there is nothing more to wait for: each job had its callback, and nothing is under way."""
    heard = {line["order"] for line in observed.journal}
    return heard == {order.name for order in plan} and not any(_check_backlog(observed.backlog))


def _check_callbacks(plan: Sequence[DemoJob], seen: Observed) -> Iterable[str]:
    heard = Counter(line["order"] for line in seen.journal)
    for order in plan:
        if heard[order.name] != 1:
            yield f"{order.name}: its callback ran {heard[order.name]} times"
    for stranger in heard.keys() - {order.name for order in plan}:
        yield f"{stranger}: a callback for an order that nobody sent"


def _check_outcomes(plan: Sequence[DemoJob], seen: Observed) -> Iterable[str]:
    told = {line["order"]: (line["end"], line["word"]) for line in seen.journal}
    for order in plan:
        promised = ("released" if order.expected.state == "released" else "failed", order.expected.reason)
        if told.get(order.name, promised) != promised:
            yield f"{order.name}: the service was told {told[order.name]}, promised was {promised}"
        line = seen.payments.get(order.payment_id)
        if order.expected.state == "refused":
            if line is not None and not _shares_payment_id(order, plan):
                yield f"{order.name}: the job was to be refused, and there is a payment"
        elif line is None:
            yield f"{order.name}: the ledger has no payment"
        elif (line.state.value, line.verdict_or_reason) != promised:
            yield f"{order.name}: the ledger says {(line.state.value, line.verdict_or_reason)}, promised was {promised}"


def _shares_payment_id(order: DemoJob, plan: Sequence[DemoJob]) -> bool:
    return any(other.payment_id == order.payment_id and other.expected.state != "refused" for other in plan)


def _check_fees(plan: Sequence[DemoJob], seen: Observed) -> Iterable[str]:
    told = {line["order"]: line["outcome"] for line in seen.journal if line.get("outcome")}
    for order in plan:
        line, outcome = seen.payments.get(order.payment_id), told.get(order.name)
        if order.expected.state == "refused" or line is None:
            continue
        in_ledger = "reused" if line.reused else line.fee.state.value if line.fee else None
        if in_ledger != order.expected.fee:
            yield f"{order.name}: its fee is {in_ledger} in the ledger, promised was {order.expected.fee}"
        if line.fee and line.fee.shared_by != order.expected.shared_by:
            yield f"{order.name}: shared by {line.fee.shared_by}, promised was {order.expected.shared_by}"
        if outcome and Decimal(outcome["fee"]["amount"]) != (line.fee.amount if line.fee else 0):
            yield f"{order.name}: the service was told another fee than the ledger has"


def _check_calls(costs: Mapping[str, ExpectedCalls], seen: Observed) -> Iterable[str]:
    for account_id in sorted({*costs, *seen.calls, *seen.accepted}):
        entries, promised = seen.calls.get(account_id, Counter()), costs.get(account_id, ExpectedCalls())
        ours = ExpectedCalls(entries[EntryState.POSTED], entries[EntryState.PENDING], entries[EntryState.VOID])
        if ours != promised:
            yield f"{account_id}: the ledger has {ours}, promised was {promised}"
        accepted = seen.accepted.get(account_id, 0)
        if not ours.posted <= accepted <= ours.posted + ours.pending:
            yield f"{account_id}: the provider accepted {accepted} calls, the ledger has {ours}"


def _check_shares(seen: Observed) -> tuple[int, list[str]]:
    """For how many refreshes it was looked at, and where the sums differ."""
    sums: dict[str, Decimal] = {}
    prices: dict[str, Decimal] = {}
    for line in seen.payments.values():
        if line.refresh_id and line.fee:
            sums[line.refresh_id] = sums.get(line.refresh_id, Decimal(0)) + line.fee.amount
            prices[line.refresh_id] = line.fee.total
    wrong = [f"{key}: shares of {sums[key]} for calls of {prices[key]}" for key in sums if sums[key] != prices[key]]
    return len(sums), wrong


def _check_backlog(backlog: Backlog) -> Iterable[str]:
    for what, count in (
        ("payments that wait", backlog.waiting_count),
        ("outcomes that were not delivered", backlog.undelivered.count),
        ("balances that were not applied", backlog.unapplied.count),
    ):
        if count:
            yield f"{count} {what}"
