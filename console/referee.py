"""Did everything come out as promised? Pure: the plan and what was seen in, findings out.

Three witnesses are heard: the payments service's journal, payready's ledger, and the simulator's log.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from console.plan import Calls, Order
from worker.ledger.payment_report import BacklogCounts, PaymentLine
from worker.rules.pricing import EntryState


@dataclass(frozen=True)
class Seen:
    """What the witnesses say."""

    journal: Sequence[Mapping[str, Any]]
    """A line for each callback that ran at the payments service."""
    payments: Mapping[str, PaymentLine]
    """The ledger's payments by id."""
    calls: Mapping[str, Counter[EntryState]]
    """The ledger's calls by account, as they stand."""
    accepted: Mapping[str, int]
    """The calls that the provider accepted, by account: what it would charge for."""
    backlog: BacklogCounts


@dataclass
class Finding:
    """One thing that was promised, for how many cases it was looked at, and what was otherwise."""

    promise: str
    cases: int
    otherwise: list[str] = field(default_factory=list)


def findings(plan: Sequence[Order], costs: Mapping[str, Calls], seen: Seen) -> list[Finding]:
    """Lay what was seen beside what was promised."""
    return [
        Finding("each job's callback ran exactly once", len(plan), list(_callbacks(plan, seen))),
        Finding("each outcome and reason is the one promised", len(plan), list(_outcomes(plan, seen))),
        Finding("each payment's fee share is the one promised", len(plan), list(_fees(plan, seen))),
        Finding("fee entries equal the calls the provider accepted", len(costs), list(_calls(costs, seen))),
        Finding("the shares of a refresh's payments add up to its calls", *_shares(seen)),
        Finding("nothing is left waiting or undelivered", 1, list(_left(seen.backlog))),
    ]


def settled(plan: Sequence[Order], seen: Seen) -> bool:
    """Whether there is nothing more to wait for: each job had its callback, and nothing is under way."""
    heard = {line["order"] for line in seen.journal}
    return heard == {order.name for order in plan} and not any(_left(seen.backlog))


def _callbacks(plan: Sequence[Order], seen: Seen) -> Iterable[str]:
    heard = Counter(line["order"] for line in seen.journal)
    for order in plan:
        if heard[order.name] != 1:
            yield f"{order.name}: its callback ran {heard[order.name]} times"
    for stranger in heard.keys() - {order.name for order in plan}:
        yield f"{stranger}: a callback for an order that nobody sent"


def _outcomes(plan: Sequence[Order], seen: Seen) -> Iterable[str]:
    told = {line["order"]: (line["end"], line["word"]) for line in seen.journal}
    for order in plan:
        promised = ("released" if order.promise.end == "released" else "failed", order.promise.word)
        if told.get(order.name, promised) != promised:
            yield f"{order.name}: the service was told {told[order.name]}, promised was {promised}"
        line = seen.payments.get(order.payment_id)
        if order.promise.end == "refused":
            if line is not None and not _belongs_to_another(order, plan):
                yield f"{order.name}: the job was to be refused, and there is a payment"
        elif line is None:
            yield f"{order.name}: the ledger has no payment"
        elif (line.state.value, line.verdict_or_reason) != promised:
            yield f"{order.name}: the ledger says {(line.state.value, line.verdict_or_reason)}, promised was {promised}"


def _belongs_to_another(order: Order, plan: Sequence[Order]) -> bool:
    return any(other.payment_id == order.payment_id and other.promise.end != "refused" for other in plan)


def _fees(plan: Sequence[Order], seen: Seen) -> Iterable[str]:
    told = {line["order"]: line["outcome"] for line in seen.journal if line.get("outcome")}
    for order in plan:
        line, outcome = seen.payments.get(order.payment_id), told.get(order.name)
        if order.promise.end == "refused" or line is None:
            continue
        in_ledger = "reused" if line.reused else line.fee.state.value if line.fee else None
        if in_ledger != order.promise.fee:
            yield f"{order.name}: its fee is {in_ledger} in the ledger, promised was {order.promise.fee}"
        if line.fee and line.fee.shared_by != order.promise.shared_by:
            yield f"{order.name}: shared by {line.fee.shared_by}, promised was {order.promise.shared_by}"
        if outcome and Decimal(outcome["fee"]["amount"]) != (line.fee.amount if line.fee else 0):
            yield f"{order.name}: the service was told another fee than the ledger has"


def _calls(costs: Mapping[str, Calls], seen: Seen) -> Iterable[str]:
    for account_id in sorted({*costs, *seen.calls, *seen.accepted}):
        entries, promised = seen.calls.get(account_id, Counter()), costs.get(account_id, Calls())
        ours = Calls(entries[EntryState.POSTED], entries[EntryState.PENDING], entries[EntryState.VOID])
        if ours != promised:
            yield f"{account_id}: the ledger has {ours}, promised was {promised}"
        accepted = seen.accepted.get(account_id, 0)
        if not ours.posted <= accepted <= ours.posted + ours.pending:
            yield f"{account_id}: the provider accepted {accepted} calls, the ledger has {ours}"


def _shares(seen: Seen) -> tuple[int, list[str]]:
    """For how many refreshes it was looked at, and where the sums differ."""
    sums: dict[str, Decimal] = {}
    prices: dict[str, Decimal] = {}
    for line in seen.payments.values():
        if line.refresh_id and line.fee:
            sums[line.refresh_id] = sums.get(line.refresh_id, Decimal(0)) + line.fee.amount
            prices[line.refresh_id] = line.fee.total
    wrong = [f"{key}: shares of {sums[key]} for calls of {prices[key]}" for key in sums if sums[key] != prices[key]]
    return len(sums), wrong


def _left(backlog: BacklogCounts) -> Iterable[str]:
    for what, count in (
        ("payments that wait", backlog.waiting),
        ("outcomes that were not delivered", backlog.undelivered),
        ("balances that were not applied", backlog.unapplied),
    ):
        if count:
            yield f"{count} {what}"
