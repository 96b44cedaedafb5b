"""Whether the invariants held, told from outside. Pure: what was seen goes in, violations come out.

Seen were what the payments service was told, the calls and deliveries of the provider, and the ledger.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

from tests.chaos.chaos_plan import SKEW_S, ChaosPlan
from worker.rules.pricing import split_share
from worker.rules.states import MAX_UNCERTAIN_CALLS

Row = Mapping[str, Any]
ALLOWED_REASONS = timedelta(seconds=2)
"""`PAYREADY_CLOCK_SKEW_S` of the storm."""
MAX_LATE_S = 60.0
"""So long after its deadline a payment must be told its end, whatever was away meanwhile."""
WINDOW_S, GRACE_S = 6.0, 1.0
"""`PAYREADY_REFRESH_WINDOW_S` and `PAYREADY_UNCERTAIN_GRACE_S` of the storm."""
TIMES = ("at", "recorded_at", "received_at", "requested_at", "resolved_at", "deadline", "due_at", "delivered_at")
DECIMAL_FIELDS = {"released": "ledger.execute_ach", "failed": "ledger.not_ready"}


@dataclass(frozen=True)
class Observed:
    """What the witnesses say."""

    sent_at: Mapping[str, float]
    """By payment, when its first message was sent (Unix seconds)."""
    delivered_results: Sequence[Row]
    """A line for each callback that ran at the payments service."""
    payments: Sequence[Row]
    replies: Sequence[Row]
    refreshes: Sequence[Row]
    fee_entries: Sequence[Row]
    balances: Sequence[Row]
    calls: Sequence[Row]
    """The simulator's."""
    deliveries: Sequence[Row]


def read(text: str) -> Observed:
    """What an earlier storm has seen, from its JSON."""
    rows = json.loads(text)
    for table in ("payments", "replies", "refreshes", "fee_entries", "balances"):
        for row in rows[table]:
            row |= {name: datetime.fromisoformat(row[name]) for name in TIMES if row.get(name)}
    return Observed(**rows)


Check = Callable[[ChaosPlan, Observed], Iterator[str]]


def violations(plan: ChaosPlan, observed: Observed) -> dict[str, list[str]]:
    """By invariant, where it did not hold; every invariant is named, with an empty list if it held."""
    return {name: list(check(plan, observed)) for name, check in INVARIANTS.items()}


def _one_outcome(plan: ChaosPlan, seen: Observed) -> Iterator[str]:
    """Each message that was sent has one callback, which may run again; all of a payment say the same."""
    callbacks: dict[str, set[str]] = defaultdict(set)
    said: dict[str, set[str]] = defaultdict(set)
    for line in seen.delivered_results:
        payment_id = line["args"][-1]
        callbacks[line["parent_id"]].add(line["id"])
        said[payment_id].add(
            repr((line["task"], line["args"][0] if line["task"] == DECIMAL_FIELDS["released"] else None))
        )
    for sending in plan.jobs:
        if sending.job is not None and len(callbacks[sending.task_id]) != 1:
            yield f"{sending.payment_id}: task {sending.task_id} has {len(callbacks[sending.task_id])} callbacks"
    for payment_id, ends in said.items():
        if len(ends) > 1:
            yield f"{payment_id}: was told {sorted(ends)}"
    for stranger in callbacks.keys() - {sending.task_id for sending in plan.jobs}:
        yield f"{stranger}: a callback for a task that nobody sent"


def _results_match_ledger(_: ChaosPlan, seen: Observed) -> Iterator[str]:
    by_id = {row["payment_id"]: row for row in seen.payments}
    for line in seen.delivered_results:
        row = by_id.get(line["args"][-1])
        if row is None:
            yield f"{line['args'][-1]}: was told of, and is not in the ledger"
        elif DECIMAL_FIELDS.get(row["state"]) != line["task"]:
            yield f"{row['payment_id']}: is {row['state']}, and was told by {line['task']}"
        elif row["state"] == "released" and row["outcome"] != line["args"][0]:
            yield f"{row['payment_id']}: was told another outcome than the ledger has"


def _every_payment_resolved(plan: ChaosPlan, seen: Observed) -> Iterator[str]:
    known = {row["payment_id"]: row for row in seen.payments}
    for payment_id in {sending.payment_id for sending in plan.jobs}:
        if payment_id not in known:
            yield f"{payment_id}: was sent, and is not in the ledger"
        elif known[payment_id]["state"] not in DECIMAL_FIELDS:
            yield f"{payment_id}: is still {known[payment_id]['state']}"
    for reply in seen.replies:
        if reply["due_at"] is not None or reply["delivered_at"] is None:
            yield f"{reply['payment_id']}: task {reply['task_id']} is not noted as told"
            continue
        # When payready told it; how long the callback then waits for a worker is the payments service's business.
        late_s = (reply["delivered_at"] - known[reply["payment_id"]]["deadline"]).total_seconds()
        was_asked_late = reply["task_id"].endswith("-again")
        if late_s > MAX_LATE_S and not was_asked_late:
            yield f"{reply['payment_id']}: was told {late_s:.0f} s after its deadline"


def _no_backlog(_: ChaosPlan, seen: Observed) -> Iterator[str]:
    for balance in seen.balances:
        if balance["due_at"] is not None:
            yield f"balance {balance['balance_id']} was never applied"
    for refresh in seen.refreshes:
        if refresh["due_at"] is not None:
            yield f"refresh {refresh['refresh_id']} is left {refresh['state']}"


def _balances_fresh(_: ChaosPlan, seen: Observed) -> Iterator[str]:
    """By the true time at which the job was sent: no role's clock is off by more than `SKEW_S`."""
    balances = {row["balance_id"]: row for row in seen.balances}
    for row in seen.payments:
        if row["state"] != "released":
            continue
        balance = balances[row["balance_id"]]
        sent_at = datetime.fromtimestamp(seen.sent_at[row["payment_id"]], UTC)
        age = timedelta(seconds=row["job"].get("max_balance_age_s", 30))
        if balance["account_id"] != row["account_id"]:
            yield f"{row['payment_id']}: was released by a balance of another account"
        if balance["at"] < sent_at - age - ALLOWED_REASONS - timedelta(seconds=SKEW_S):
            yield f"{row['payment_id']}: was released by a balance of {balance['at']}, sent at {sent_at} for {age}"


def _no_double_cover(_: ChaosPlan, seen: Observed) -> Iterator[str]:
    """What was released on an account since a balance's time is not more than the balance.

    Releases so close in time that clocks may tell their order wrong count only if they were by the same balance.
    """
    released: dict[str, list[Row]] = defaultdict(list)
    for row in seen.payments:
        if row["state"] == "released" and row["outcome"]["verdict"] == "sufficient":
            released[row["account_id"]].append(row)
    for balance in seen.balances:
        if balance["available"] is None:
            continue
        here = [row for row in released[balance["account_id"]] if row["balance_id"] == balance["balance_id"]]
        if not here:
            continue
        last = max(row["resolved_at"] for row in here)
        others = [
            row
            for row in released[balance["account_id"]]
            if row not in here and balance["at"] + ALLOWED_REASONS < row["resolved_at"] < last - ALLOWED_REASONS
        ]
        # One after the other: an early one may not know of a later one by another balance, so the last one must fit.
        spent = sum((Decimal(row["amount"]) for row in [*here, *others]), Decimal(0))
        if spent > Decimal(balance["available"]):
            yield f"balance {balance['balance_id']}: {spent} were released, {balance['available']} were there"


def _calls_by_account(seen: Observed) -> dict[str, list[Row]]:
    calls: dict[str, list[Row]] = defaultdict(list)
    for call in seen.calls:
        calls[call["account_id"]].append(call)
    return calls


def _every_call_has_fee_entry(_: ChaosPlan, seen: Observed) -> Iterator[str]:
    states: dict[str, dict[str, str]] = defaultdict(dict)
    opened: dict[str, list[datetime]] = defaultdict(list)
    for entry in seen.fee_entries:
        if entry["state"] == "pending":
            opened[entry["account_id"]].append(entry["recorded_at"])
        elif states[entry["account_id"]].get(entry["call_id"]) != "pending":
            yield f"call {entry['call_id']}: an entry follows {states[entry['account_id']].get(entry['call_id'])}"
        states[entry["account_id"]][entry["call_id"]] = entry["state"]
    calls = _calls_by_account(seen)
    for account_id in calls.keys() | states.keys():
        accepted = sum(call["accepted"] for call in calls[account_id])
        kept = Counter(states[account_id].values())
        if not kept["posted"] <= accepted <= kept["posted"] + kept["pending"]:
            yield f"{account_id}: the provider accepted {accepted} calls, the ledger has {dict(kept)}"
        late = SKEW_S + 0.001
        for call, at in zip(calls[account_id], sorted(opened[account_id]), strict=False):
            if at.timestamp() > call["started_at"] + late:
                yield f"{account_id}: a call of {call['started_at']} was entered at {at}"
        if len(calls[account_id]) > len(states[account_id]):
            yield f"{account_id}: {len(calls[account_id])} calls came in, {len(states[account_id])} were entered"


def _no_blind_repeat(_: ChaosPlan, seen: Observed) -> Iterator[str]:
    states: dict[str, dict[str, str]] = defaultdict(dict)
    for entry in seen.fee_entries:
        states[entry["refresh_id"]][entry["call_id"]] = entry["state"]
    for refresh_id, calls in states.items():
        unknown = sum(state != "void" for state in calls.values())
        if unknown > MAX_UNCERTAIN_CALLS:
            yield f"refresh {refresh_id}: {unknown} calls that may be charged"


def _one_in_flight(_: ChaosPlan, seen: Observed) -> Iterator[str]:
    """After an accepted call the account is left alone until its balance came, or its time is over."""
    arrived: dict[str, float] = {}
    for delivery in seen.deliveries:
        if delivery["status"] == 204:
            for balance_id in delivery["balance_ids"]:
                arrived.setdefault(balance_id, delivery["sent_at"])
    for balance in seen.balances:
        if balance["event_id"].startswith("poll:"):  # its webhook was late, and a free read was quicker
            arrived[balance["balance_id"]] = balance["received_at"].timestamp() - SKEW_S
    for account_id, calls in _calls_by_account(seen).items():
        for one, other in pairwise(calls):
            if not one["accepted"]:
                continue
            apart_s = other["started_at"] - one["started_at"]
            # An early event is tried before the answer is given, which may then come too late for the caller.
            was_answered = one["status"] == 202 and one["effective_scenario"] != "early"
            least_s = (WINDOW_S if was_answered else GRACE_S) - 2 * SKEW_S
            came = arrived.get(one["balance_id"] or "", float("inf")) <= other["started_at"]
            # The balance of a call before it may be taken for its own, as the provider names no call in it.
            before = [arrived.get(call["balance_id"] or "", 0) for call in calls if call["seq"] < one["seq"]]
            earlier = any(at > one["started_at"] - ALLOWED_REASONS.total_seconds() for at in before)
            if apart_s < least_s and not came and not earlier:
                yield f"{account_id}: called again after {apart_s:.1f} s"


def _fee_shares_add_up(_: ChaosPlan, seen: Observed) -> Iterator[str]:
    """Each sharer was told another part of the same whole, so that all parts add up to it."""
    sharers = Counter(row["refresh_id"] for row in seen.payments if row["refresh_id"] and not row["reused"])
    told: dict[str, list[Row]] = defaultdict(list)
    for row in seen.payments:
        if row["refresh_id"] and not row["reused"] and row["state"] == "released":
            told[row["refresh_id"]].append(row["outcome"])
    for refresh_id, outcomes in told.items():
        count = sharers[refresh_id]
        if {outcome["shared_by"] for outcome in outcomes} != {count}:
            yield f"refresh {refresh_id}: {count} share it, told was {[o['shared_by'] for o in outcomes]}"
            continue
        begun = [
            entry for entry in seen.fee_entries if entry["refresh_id"] == refresh_id and entry["state"] == "pending"
        ]
        prices = [Decimal(entry["price"]) for entry in begun]
        wholes = [sum(prices[:n], Decimal(0)) for n in range(len(prices) + 1)]
        amounts = Counter(Decimal(outcome["fee"]["amount"]) for outcome in outcomes)
        if not any(amounts <= Counter(split_share(whole, count, index) for index in range(count)) for whole in wholes):
            yield f"refresh {refresh_id}: told were {sorted(amounts.elements())} of {wholes}"


INVARIANTS: Mapping[str, Check] = {
    "one outcome a payment, one callback a task": _one_outcome,
    "what was told is what the ledger says": _results_match_ledger,
    "no payment is forgotten, none is told late": _every_payment_resolved,
    "nothing is left to be done": _no_backlog,
    "no stale balance releases": _balances_fresh,
    "no balance covers twice": _no_double_cover,
    "every call has its fee entry, written before it": _every_call_has_fee_entry,
    "no call that may be charged is repeated but once": _no_blind_repeat,
    "one call in flight an account": _one_in_flight,
    "the shares of a fee add up to it": _fee_shares_add_up,
}
