"""The invariants that a system keeps in spite of an injected fault, as far as they are visible from outside."""

from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from tests.support.faulty_system import FaultySystem
from worker.rules.pricing import split_share
from worker.rules.states import MAX_UNCERTAIN_CALLS


def violations(system: FaultySystem) -> Iterator[str]:
    """Yield the violated invariants, as far as they are visible from outside."""
    yield from _outcomes(system)
    yield from _calls(system)
    yield from _shares(system)
    for table in ("outcome_delivery", "refresh", "balance"):
        if left := system.rows(f"SELECT * FROM {table} WHERE due_at IS NOT NULL"):
            yield f"unfinished work: {left}"


def _outcomes(system: FaultySystem) -> Iterator[str]:
    jobs = {job["payment_id"]: job for _, job in system.scenario.jobs if job is not None}
    rows = {row["payment_id"]: row for row in system.rows("SELECT * FROM payment LEFT JOIN balance USING (balance_id)")}
    for payment_id, job in jobs.items():
        outcomes = system.outcomes[f"task_{payment_id}"]
        if not outcomes or any(outcome != outcomes[0] for outcome in outcomes):
            yield f"{payment_id} received {outcomes}"
            continue
        row = rows[payment_id]
        released = isinstance(outcomes[0], dict)
        if (row["state"] == "released") != released or row["state"] == "waiting":
            yield f"{payment_id} is {row['state']}, but the outcome is {outcomes[0]}"
        if released:
            oldest = _time(row["requested_at"]) - timedelta(seconds=job.get("max_balance_age_s", 30))
            if _time(row["at"]) < oldest - system.rt.settings.clock_skew:
                yield f"{payment_id} was released by a stale balance"
    spent = [Decimal(row["amount"]) for row in rows.values() if row["state"] == "released" and row["amount"]]
    if system.scenario.available == "100.00" and len(system.provider.accepted) <= 1 and sum(spent) > Decimal(100):
        yield f"{spent} were released on one balance of 100"


def _calls(system: FaultySystem) -> Iterator[str]:
    states: dict[str, str] = {}
    refreshes: dict[str, set[str]] = defaultdict(set)
    for row in system.rows("SELECT * FROM fee_entry ORDER BY entry_id"):
        states[row["call_id"]] = row["state"]
        refreshes[row["refresh_id"]].add(row["call_id"])
    posted, void = (sum(state == expected for state in states.values()) for expected in ("posted", "void"))
    if not posted <= len(system.provider.accepted) <= len(states) - void:
        yield f"{len(system.provider.accepted)} calls were accepted, but the entries are {list(states.values())}"
    if len(system.provider.attempts) > len(states):
        yield f"{len(system.provider.attempts)} calls were made, but {len(states)} have entries"
    for calls in refreshes.values():
        if sum(states[call] != "void" for call in calls) > MAX_UNCERTAIN_CALLS:
            yield "a call that may be billed was repeated more than once"
    arrived = [_time(row["received_at"]) for row in system.rows("SELECT * FROM balance")]
    for call, next_call in zip(system.provider.accepted, system.provider.accepted[1:], strict=False):
        balance_arrived = any(call < at <= next_call for at in arrived)
        if not balance_arrived and (next_call - call).total_seconds() < system.rt.settings.uncertain_grace_s:
            yield f"called again after {next_call - call}, while the first call was in flight"


def _shares(system: FaultySystem) -> Iterator[str]:
    sharing = system.rows("SELECT * FROM payment WHERE refresh_id IS NOT NULL AND NOT reused")
    for refresh_id in {row["refresh_id"] for row in sharing}:
        sharers = [row["payment_id"] for row in sharing if row["refresh_id"] == refresh_id]
        outcomes = [outcome for payment_id in sharers for outcome in system.outcomes[f"task_{payment_id}"][:1]]
        amounts = [Decimal(outcome["fee"]["amount"]) for outcome in outcomes if isinstance(outcome, dict)]
        price = Decimal("0.1")
        wholes = [
            [split_share(price * n, len(sharers), i) for i in range(len(sharers))]
            for n in range(MAX_UNCERTAIN_CALLS + 1)
        ]
        if not any(_part_of(amounts, whole) for whole in wholes):
            yield f"{sharers} share {refresh_id}, with the fees {amounts}"


def _part_of(amounts: list[Decimal], whole: list[Decimal]) -> bool:
    left = list(whole)
    for amount in amounts:
        if amount not in left:
            return False
        left.remove(amount)
    return True


def _time(value: str | datetime) -> datetime:
    at = datetime.fromisoformat(value) if isinstance(value, str) else value
    return at if at.tzinfo else at.replace(tzinfo=UTC)
