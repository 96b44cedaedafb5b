"""Invariants of a chaos test, as pure functions from observations to violations.

The observations are the callbacks at the payments service, the calls and deliveries of the provider, and the ledger.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

from tests.chaos.chaos_plan import SKEW_S, ChaosPlan
from worker.rules.pricing import split_share
from worker.rules.states import MAX_UNCERTAIN_CALLS

Row = Mapping[str, Any]
CLOCK_SKEW = timedelta(seconds=2)
"""`PAYREADY_CLOCK_SKEW_S` of the chaos test."""
MAX_LATE_S = 60.0
"""Maximum delay of a delivery after the payment's deadline, including outages."""
WINDOW_S, GRACE_S = 6.0, 1.0
"""`PAYREADY_REFRESH_WINDOW_S` and `PAYREADY_UNCERTAIN_GRACE_S` of the chaos test."""
TIMES = (
    "at",
    "recorded_at",
    "received_at",
    "requested_at",
    "resolved_at",
    "deadline",
    "due_at",
    "delivered_at",
    "hold_until",
)
CALLBACK_TASKS = {"released": "ledger.execute_ach", "failed": "ledger.not_ready"}


@dataclass(frozen=True)
class Observed:
    """Observations from outside of payready."""

    sent_at: Mapping[str, float]
    """Time of the first message by payment, in Unix seconds."""
    delivered_results: Sequence[Row]
    """One record per callback that ran at the payments service."""
    payments: Sequence[Row]
    replies: Sequence[Row]
    refreshes: Sequence[Row]
    fee_entries: Sequence[Row]
    balances: Sequence[Row]
    calls: Sequence[Row]
    """Calls and webhook deliveries in the simulator's log."""
    deliveries: Sequence[Row]
    debits: Sequence[Row]
    """Debits at the simulator's bank."""
    resent_tasks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Further tasks of jobs that the payments service sent again without an outcome, by task id of the plan."""


def read(text: str) -> Observed:
    """Parse the recorded observations of an earlier run."""
    rows = json.loads(text)
    for table in ("payments", "replies", "refreshes", "fee_entries", "balances"):
        for row in rows[table]:
            row |= {name: datetime.fromisoformat(row[name]) for name in TIMES if row.get(name)}
    return Observed(**rows)


Check = Callable[[ChaosPlan, Observed], Iterator[str]]


def violations(plan: ChaosPlan, observed: Observed) -> dict[str, list[str]]:
    """Return the violations by invariant, with an empty list for each invariant without violations."""
    return {name: list(check(plan, observed)) for name, check in INVARIANTS.items()}


def _one_outcome(plan: ChaosPlan, observed: Observed) -> Iterator[str]:
    """Each message has one callback, which may run repeatedly. All callbacks of a payment have the same outcome.

    A message that was sent again has a callback in one of its tasks at least: the others may be lost in a failover.
    """
    callbacks: dict[str, set[str]] = defaultdict(set)
    outcomes: dict[str, set[str]] = defaultdict(set)
    for line in observed.delivered_results:
        payment_id = line["args"][-1]
        callbacks[line["parent_id"]].add(line["id"])
        outcomes[payment_id].add(
            repr((line["task"], line["args"][0] if line["task"] == CALLBACK_TASKS["released"] else None))
        )
    tasks = {
        sending.task_id: [sending.task_id, *observed.resent_tasks.get(sending.task_id, ())]
        for sending in plan.jobs
        if sending.job is not None
    }
    for task_id, same_job in tasks.items():
        counts = [len(callbacks[each]) for each in same_job]
        if max(counts) != 1:
            yield f"task {task_id} has {max(counts)} callbacks"
    for payment_id, different_outcomes in outcomes.items():
        if len(different_outcomes) > 1:
            yield f"{payment_id}: has several outcomes: {sorted(different_outcomes)}"
    for task_id in callbacks.keys() - {each for same_job in tasks.values() for each in same_job}:
        yield f"{task_id}: has a callback but was never sent"


def _results_match_ledger(_: ChaosPlan, observed: Observed) -> Iterator[str]:
    by_id = {row["payment_id"]: row for row in observed.payments}
    for line in observed.delivered_results:
        row = by_id.get(line["args"][-1])
        if row is None:
            yield f"{line['args'][-1]}: has a callback but no ledger row"
        elif CALLBACK_TASKS.get(row["state"]) != line["task"]:
            yield f"{row['payment_id']}: is {row['state']}, but the callback was {line['task']}"
        elif row["state"] == "released" and row["outcome"] != line["args"][0]:
            yield f"{row['payment_id']}: the delivered outcome differs from the ledger"


def _every_payment_resolved(plan: ChaosPlan, observed: Observed) -> Iterator[str]:
    known = {row["payment_id"]: row for row in observed.payments}
    for payment_id in {sending.payment_id for sending in plan.jobs}:
        if payment_id not in known:
            yield f"{payment_id}: was sent but has no ledger row"
        elif known[payment_id]["state"] not in CALLBACK_TASKS:
            yield f"{payment_id}: is still {known[payment_id]['state']}"
    for delivery in observed.replies:
        if delivery["due_at"] is not None or delivery["delivered_at"] is None:
            yield f"{delivery['payment_id']}: task {delivery['task_id']} is not marked delivered"
            continue
        # The time of payready's delivery. The payments service determines how long the callback then waits.
        late_s = (delivery["delivered_at"] - known[delivery["payment_id"]]["deadline"]).total_seconds()
        was_repeated = "-again" in delivery["task_id"] or "-resent" in delivery["task_id"]
        if late_s > MAX_LATE_S and not was_repeated:
            yield f"{delivery['payment_id']}: its outcome was delivered {late_s:.0f} s after its deadline"


def _no_backlog(_: ChaosPlan, observed: Observed) -> Iterator[str]:
    for balance in observed.balances:
        if balance["due_at"] is not None:
            yield f"balance {balance['balance_id']} was never applied"
    for refresh in observed.refreshes:
        if refresh["due_at"] is not None:
            yield f"refresh {refresh['refresh_id']} is still {refresh['state']}"


def _balances_fresh(_: ChaosPlan, observed: Observed) -> Iterator[str]:
    """Compare with the true time of the job's message. No role's clock deviates by more than `SKEW_S`."""
    balances = {row["balance_id"]: row for row in observed.balances}
    for row in observed.payments:
        if row["state"] != "released":
            continue
        balance = balances[row["balance_id"]]
        sent_at = datetime.fromtimestamp(observed.sent_at[row["payment_id"]], UTC)
        age = timedelta(seconds=row["job"].get("max_balance_age_s", 30))
        if balance["account_id"] != row["account_id"]:
            yield f"{row['payment_id']}: was released by a balance of another account"
        if balance["at"] < sent_at - age - CLOCK_SKEW - timedelta(seconds=SKEW_S):
            yield f"{row['payment_id']}: was released by a balance of {balance['at']}, sent at {sent_at} for {age}"


def _no_double_cover(_: ChaosPlan, observed: Observed) -> Iterator[str]:
    """The releases on an account since a balance's time do not exceed the balance.

    Releases whose order is uncertain because of clock skew count only if the same balance released them.
    """
    released: dict[str, list[Row]] = defaultdict(list)
    for row in observed.payments:
        if row["state"] == "released" and row["outcome"]["verdict"] == "sufficient":
            released[row["account_id"]].append(row)
    for balance in observed.balances:
        if balance["available"] is None:
            continue
        same_balance = [row for row in released[balance["account_id"]] if row["balance_id"] == balance["balance_id"]]
        if not same_balance:
            continue
        last = max(row["resolved_at"] for row in same_balance)
        others = [
            row
            for row in released[balance["account_id"]]
            if row not in same_balance and balance["at"] + CLOCK_SKEW < row["resolved_at"] < last - CLOCK_SKEW
        ]
        # An early release cannot account for a later one by another balance, so the last release must fit.
        spent = sum((Decimal(row["amount"]) for row in [*same_balance, *others]), Decimal(0))
        if spent > Decimal(balance["available"]):
            yield f"balance {balance['balance_id']}: {spent} were released, but {balance['available']} were available"


def _bank_pays_every_debit(_: ChaosPlan, observed: Observed) -> Iterator[str]:
    """The true balance covers each payment that was released as `sufficient`, at any time the debit is made.

    A payment that was released as `unchecked` may exceed the balance, which the provider does not know.
    """
    checked = {row["payment_id"]: row for row in observed.payments if row["outcome"].get("verdict") == "sufficient"}
    for debit in observed.debits:
        row = checked.get(debit["payment_id"])
        if row is not None and not debit["paid"]:
            made_at = datetime.fromtimestamp(debit["at"], UTC)
            yield (
                f"{debit['payment_id']}, {debit['account_id']}: was released at {row['resolved_at']} by "
                f"{row['balance_id']}; {debit['amount']} was debited at {made_at} from {debit['balance_before']}"
            )


def _funds_holds_outlast_debits(_: ChaosPlan, observed: Observed) -> Iterator[str]:
    """No funds hold ends before its debit. The plan leaves `MAX_CALLBACK_DELAY_S` for callbacks during outages."""
    ends = {row["payment_id"]: row["hold_until"] for row in observed.payments if row["state"] == "released"}
    for debit in observed.debits:
        made_at = datetime.fromtimestamp(debit["at"], UTC)
        end = ends.get(debit["payment_id"], made_at)
        if end is None or end < made_at - timedelta(seconds=SKEW_S):
            yield f"{debit['payment_id']}: was debited at {made_at}, after the end of its funds hold at {end}"


def _every_release_is_debited(_: ChaosPlan, observed: Observed) -> Iterator[str]:
    """The debits are those of the released payments, so that the invariant above covers each of them."""
    debited = {debit["payment_id"]: Decimal(debit["amount"]) for debit in observed.debits}
    released = {row["payment_id"]: row for row in observed.payments if row["state"] == "released"}
    for payment_id in released.keys() ^ debited.keys():
        yield f"{payment_id}: was {'released, but not debited' if payment_id in released else 'debited, not released'}"
    for payment_id in released.keys() & debited.keys():
        if debited[payment_id] != Decimal(released[payment_id]["amount"]):
            yield f"{payment_id}: {debited[payment_id]} was debited"


def _calls_by_account(observed: Observed) -> dict[str, list[Row]]:
    calls: dict[str, list[Row]] = defaultdict(list)
    for call in observed.calls:
        calls[call["account_id"]].append(call)
    return calls


def _every_call_has_fee_entry(_: ChaosPlan, observed: Observed) -> Iterator[str]:
    states: dict[str, dict[str, str]] = defaultdict(dict)
    opened: dict[str, list[datetime]] = defaultdict(list)
    for entry in observed.fee_entries:
        if entry["state"] == "pending":
            opened[entry["account_id"]].append(entry["recorded_at"])
        elif states[entry["account_id"]].get(entry["call_id"]) != "pending":
            yield f"call {entry['call_id']}: an entry follows {states[entry['account_id']].get(entry['call_id'])}"
        states[entry["account_id"]][entry["call_id"]] = entry["state"]
    calls = _calls_by_account(observed)
    for account_id in calls.keys() | states.keys():
        accepted = sum(call["accepted"] for call in calls[account_id])
        counts = Counter(states[account_id].values())
        if not counts["posted"] <= accepted <= counts["posted"] + counts["pending"]:
            yield f"{account_id}: the provider accepted {accepted} calls, the ledger has {dict(counts)}"
        tolerance_s = SKEW_S + 0.001
        for call, at in zip(calls[account_id], sorted(opened[account_id]), strict=False):
            if at.timestamp() > call["started_at"] + tolerance_s:
                yield f"{account_id}: a call of {call['started_at']} has its first entry at {at}"
        if len(calls[account_id]) > len(states[account_id]):
            yield f"{account_id}: {len(calls[account_id])} calls were made, but {len(states[account_id])} have entries"


def _no_blind_repeat(_: ChaosPlan, observed: Observed) -> Iterator[str]:
    states: dict[str, dict[str, str]] = defaultdict(dict)
    for entry in observed.fee_entries:
        states[entry["refresh_id"]][entry["call_id"]] = entry["state"]
    for refresh_id, calls in states.items():
        unknown = sum(state != "void" for state in calls.values())
        if unknown > MAX_UNCERTAIN_CALLS:
            yield f"refresh {refresh_id}: {unknown} calls that may be billed"


def _one_in_flight(_: ChaosPlan, observed: Observed) -> Iterator[str]:
    """After an accepted call the account is not called again until its balance arrives or its window ends."""
    arrived: dict[str, float] = {}
    for delivery in observed.deliveries:
        if delivery["status"] == 204:
            for balance_id in delivery["balance_ids"]:
                arrived.setdefault(balance_id, delivery["sent_at"])
    for balance in observed.balances:
        if balance["event_id"].startswith("poll:"):  # a balance poll was faster than the webhook
            arrived[balance["balance_id"]] = balance["received_at"].timestamp() - SKEW_S
    for account_id, calls in _calls_by_account(observed).items():
        for call, next_call in pairwise(calls):
            if not call["accepted"]:
                continue
            interval_s = next_call["started_at"] - call["started_at"]
            # The webhook of `early` is sent before the response, which may then exceed the caller's timeout.
            has_response = call["status"] == 202 and call["effective_scenario"] != "early"
            least_s = (WINDOW_S if has_response else GRACE_S) - 2 * SKEW_S
            balance_arrived = arrived.get(call["balance_id"] or "", float("inf")) <= next_call["started_at"]
            # The balance of an earlier call may be attributed to this call, as balances do not name their call.
            before = [arrived.get(other["balance_id"] or "", 0) for other in calls if other["seq"] < call["seq"]]
            earlier = any(at > call["started_at"] - CLOCK_SKEW.total_seconds() for at in before)
            if interval_s < least_s and not balance_arrived and not earlier:
                yield f"{account_id}: called again after {interval_s:.1f} s"


def _fee_shares_add_up(_: ChaosPlan, observed: Observed) -> Iterator[str]:
    """Each payment that shares a fee received another part of it, so that the parts add up to the fee."""
    sharers = Counter(row["refresh_id"] for row in observed.payments if row["refresh_id"] and not row["reused"])
    outcomes_by_refresh: dict[str, list[Row]] = defaultdict(list)
    for row in observed.payments:
        if row["refresh_id"] and not row["reused"] and row["state"] == "released":
            outcomes_by_refresh[row["refresh_id"]].append(row["outcome"])
    for refresh_id, outcomes in outcomes_by_refresh.items():
        count = sharers[refresh_id]
        if {outcome["shared_by"] for outcome in outcomes} != {count}:
            yield f"refresh {refresh_id}: {count} share it, but `shared_by` is {[o['shared_by'] for o in outcomes]}"
            continue
        opened = [
            entry for entry in observed.fee_entries if entry["refresh_id"] == refresh_id and entry["state"] == "pending"
        ]
        prices = [Decimal(entry["price"]) for entry in opened]
        totals = [sum(prices[:n], Decimal(0)) for n in range(len(prices) + 1)]
        amounts = Counter(Decimal(outcome["fee"]["amount"]) for outcome in outcomes)
        if not any(amounts <= Counter(split_share(total, count, index) for index in range(count)) for total in totals):
            yield f"refresh {refresh_id}: the fees are {sorted(amounts.elements())} of {totals}"


INVARIANTS: Mapping[str, Check] = {
    "one outcome per payment, one callback per task": _one_outcome,
    "delivered outcomes equal the ledger": _results_match_ledger,
    "every payment is resolved and delivered in time": _every_payment_resolved,
    "no work is left": _no_backlog,
    "no stale balance releases a payment": _balances_fresh,
    "no balance is spent twice": _no_double_cover,
    "the bank can pay every released payment": _bank_pays_every_debit,
    "no funds hold ends before its debit": _funds_holds_outlast_debits,
    "every released payment is debited": _every_release_is_debited,
    "every call has its fee entry, written before it": _every_call_has_fee_entry,
    "a call that may be billed is repeated at most once": _no_blind_repeat,
    "one call in flight per account": _one_in_flight,
    "fee shares add up to the fee": _fee_shares_add_up,
}
