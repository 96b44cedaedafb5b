"""What is measured; each case is a function of a warm system and the sizes that were asked for."""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

from benchmarks import meter, past
from benchmarks.rig import Rig
from worker.ledger import cap_usage, fee_calls, fee_statement
from worker.ledger.engine import Tx, read_only

Figures = dict[str, Any]
TAIL_S = 1.0
"""What is done after the last outcome (acknowledgements, notes) counts too."""


def _quantiles(waits: Sequence[float]) -> Figures:
    ordered = sorted(waits)
    return {f"p{q}_ms": round(ordered[min(len(ordered) - 1, len(ordered) * q // 100)], 1) for q in (50, 95, 99)}


def _settle(rig: Rig, accounts: list[str], **how: Any) -> tuple[list[str], Figures]:
    before = meter.cpu()
    ids = rig.enqueue(accounts, **how)
    rig.settled(ids)
    time.sleep(TAIL_S)
    spent = meter.per_1000(before, meter.cpu(), len(ids))
    released = rig.count(
        "SELECT count(*) FROM payment WHERE payment_id BETWEEN :first AND :last AND state = 'released'",
        first=ids[0],
        last=ids[-1],
    )
    return ids, {"payments": len(ids), "released": released, "cpu_s_per_1000": spent}


def burst(rig: Rig, sizes: argparse.Namespace) -> Figures:
    """Payments on as many accounts, enqueued at once."""
    ids, figures = _settle(rig, rig.accounts(sizes.n))
    return {"payments_per_s": round(len(ids) / rig.span(ids), 1), **figures}


def paced(rig: Rig, sizes: argparse.Namespace) -> Figures:
    """Payments at a steady rate: from the webhook's departure to the outcome."""
    ids, figures = _settle(rig, rig.accounts(int(sizes.rate * sizes.seconds)), per_second=sizes.rate)
    return {"per_second": sizes.rate, **_quantiles(rig.waits(ids)), **figures}


def hot(rig: Rig, sizes: argparse.Namespace) -> Figures:
    """The payments of a burst on ten accounts: a call for each account, and its fee shared."""
    accounts = rig.accounts(10)
    ids, figures = _settle(rig, [accounts[number % 10] for number in range(sizes.hot)])
    calls = sum(len(rig.system.simulator.calls(account)) for account in accounts)
    return {"payments_per_s": round(len(ids) / rig.span(ids), 1), "calls": calls, **figures}


def parked(rig: Rig, sizes: argparse.Namespace) -> Figures:
    """Payments whose webhook does not come: what each holds, and whether a fresh one is settled at once meanwhile."""
    memory, stored = meter.memory(), rig.stored()
    accounts = rig.accounts(sizes.parked, "never")
    started = time.monotonic()
    rig.enqueue(accounts, timeout_s=3600)
    rig.called(accounts)
    took = time.monotonic() - started
    time.sleep(10)  # for upkeep's first look at all of them
    before, began = meter.cpu(), time.monotonic()
    time.sleep(5)
    idle = meter.busy_cores(time.monotonic() - began, _less(meter.cpu(), before))
    held = {store: round(size / sizes.parked) for store, size in _less(rig.stored(), stored).items()}
    grown = {role: round(size / sizes.parked) for role, size in _less(meter.memory(), memory).items()}
    ids, _ = _settle(rig, rig.accounts(50), per_second=5)
    return {
        "parked": sizes.parked,
        "parked_in_s": round(took, 1),
        "bytes_each": held,
        "process_bytes_each": grown,
        "cores_while_parked": idle,
        "fresh": _quantiles(rig.waits(ids)),
    }


def growth(rig: Rig, sizes: argparse.Namespace) -> Figures:
    """The same burst with more and more behind it: settled payments, and a tenth as many that wait."""
    figures: Figures = {}
    there = 0
    for stored in (0, 1_000, 10_000, 100_000, 1_000_000):
        if stored:
            past.fill(rig.system.engine, stored * 10 // 7, first=there * 5 // 7)  # 7 payments on 5 calls of 2 entries
            past.park(rig.system.engine, stored // 10, first=there // 10)
            there = stored
        for _ in range(2):  # the first one with cold caches
            _, figures[f"behind_{stored}"] = _settle(rig, rig.accounts(sizes.n // 2))
    return figures


def restart(rig: Rig, sizes: argparse.Namespace) -> Figures:
    """A steady rate while the roles are replaced, one replica after the other: two of each worker, one endpoint."""
    for replica in ("worker2", "refresh2"):
        rig.start_replica(replica)
    count = int(sizes.rate * sizes.seconds)
    ids, _ = _settle(rig, rig.accounts(count), per_second=sizes.rate)
    calm = _quantiles(rig.waits(ids))
    with ThreadPoolExecutor(1) as pool:
        restarted = pool.submit(_replace_all, rig)
        ids = []
        while not restarted.done() or not ids:
            ids += rig.enqueue(rig.accounts(int(sizes.rate)), per_second=sizes.rate)
        took = restarted.result()
    rig.settled(ids)
    states = Counter(row["state"] for row in rig.payments(ids))
    later = _quantiles(rig.waits(ids))
    return {
        "per_second": sizes.rate,
        "replicas_s": took,
        "all_s": round(sum(took.values()), 1),
        "payments": len(ids),
        **{f"{state}": number for state, number in states.items()},
        "lost": len(ids) - states.total(),
        "calm": calm,
        "meanwhile": later,
        "p99_later_by_ms": round(later["p99_ms"] - calm["p99_ms"], 1),
    }


def _replace_all(rig: Rig) -> Figures:
    return {replica: rig.replace(replica) for replica in ("worker", "worker2", "refresh", "refresh2", "web", "beat")}


def statement(rig: Rig, sizes: argparse.Namespace) -> Figures:
    """What finance and the caps ask of a month with a million fee entries: seconds, the median of three."""
    past.fill(rig.system.engine, sizes.entries)
    since, until = datetime(2026, 10, 1, tzinfo=UTC), datetime(2026, 11, 1, tzinfo=UTC)
    questions: dict[str, Callable[[Tx], Any]] = {
        "by_price": lambda tx: (
            fee_statement.statement_lines(tx, since, until, "price"),
            fee_statement.savings_by_currency(tx, since, until),
        ),
        "by_day": lambda tx: fee_statement.statement_lines(tx, since, until, "day"),
        "by_account": lambda tx: fee_statement.statement_lines(tx, since, until, "account"),
        "by_payment": lambda tx: sum(1 for _ in fee_statement.payment_shares(tx, since, until)),
        "open_questions": lambda tx: fee_calls.unresolved_calls(tx, until),
        "cap_of_a_month": lambda tx: cap_usage.total_spent(tx, "USD", since, until),
        "cap_of_a_day": lambda tx: cap_usage.total_spent(tx, "USD", until - timedelta(days=1), until),
    }
    entries = rig.count("SELECT count(*) FROM fee_entry")
    return {"entries": entries, **{f"{name}_s": _asked(rig, ask) for name, ask in questions.items()}}


def _asked(rig: Rig, ask: Callable[[Tx], Any]) -> float:
    took = []
    for _ in range(3):
        with read_only(rig.system.engine) as tx:
            start = time.monotonic()
            ask(tx)
            took.append(time.monotonic() - start)
    return round(sorted(took)[1], 2)


def _less(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0) for name, value in after.items()}


CASES: Mapping[str, Callable[[Rig, argparse.Namespace], Figures]] = {
    "burst": burst,
    "paced": paced,
    "hot": hot,
    "parked": parked,
    "growth": growth,
    "restart": restart,
    "statement": statement,
}
