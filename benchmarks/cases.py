"""What is measured; each case is a function of a warm system and the sizes that were asked for."""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

from benchmarks import process_stats, seed_data
from benchmarks.benchmark_system import BenchmarkSystem
from worker.ledger import cap_usage, fee_calls, fee_statement
from worker.ledger.engine import Tx, read_only

Figures = dict[str, Any]
TAIL_TIME_S = 1.0
"""What is done after the last outcome (acknowledgements, notes) counts too."""


def _quantiles(waits: Sequence[float]) -> Figures:
    ordered = sorted(waits)
    return {f"p{q}_ms": round(ordered[min(len(ordered) - 1, len(ordered) * q // 100)], 1) for q in (50, 95, 99)}


def _run_to_end(rig: BenchmarkSystem, accounts: list[str], **how: Any) -> tuple[list[str], Figures]:
    before = process_stats.cpu_seconds()
    ids = rig.enqueue(accounts, **how)
    rig.resolved(ids)
    time.sleep(TAIL_TIME_S)
    spent = process_stats.per_1000(before, process_stats.cpu_seconds(), len(ids))
    released = rig.count(
        "SELECT count(*) FROM payment WHERE payment_id BETWEEN :first AND :last AND state = 'released'",
        first=ids[0],
        last=ids[-1],
    )
    return ids, {"payments": len(ids), "released": released, "cpu_s_per_1000": spent}


def burst(rig: BenchmarkSystem, sizes: argparse.Namespace) -> Figures:
    """Payments on as many accounts, enqueued at once."""
    ids, figures = _run_to_end(rig, rig.accounts(sizes.n))
    return {"payments_per_s": round(len(ids) / rig.duration_s(ids), 1), **figures}


def paced(rig: BenchmarkSystem, sizes: argparse.Namespace) -> Figures:
    """Payments at a steady rate: from the webhook's departure to the outcome."""
    ids, figures = _run_to_end(rig, rig.accounts(int(sizes.rate * sizes.seconds)), per_second=sizes.rate)
    return {"per_second": sizes.rate, **_quantiles(rig.wait_times(ids)), **figures}


def hot_accounts(rig: BenchmarkSystem, sizes: argparse.Namespace) -> Figures:
    """The payments of a burst on ten accounts: a call for each account, and its fee shared."""
    accounts = rig.accounts(10)
    ids, figures = _run_to_end(rig, [accounts[number % 10] for number in range(sizes.hot)])
    calls = sum(len(rig.system.simulator.calls(account)) for account in accounts)
    return {"payments_per_s": round(len(ids) / rig.duration_s(ids), 1), "calls": calls, **figures}


def idle_waiting(rig: BenchmarkSystem, sizes: argparse.Namespace) -> Figures:
    """Payments whose webhook does not come: what each holds, and whether a fresh one is settled at once meanwhile."""
    memory, stored = process_stats.memory_kib(), rig.storage_bytes()
    accounts = rig.accounts(sizes.parked, "never")
    started = time.monotonic()
    rig.enqueue(accounts, timeout_s=3600)
    rig.called(accounts)
    took = time.monotonic() - started
    time.sleep(10)  # for upkeep's first look at all of them
    before, began = process_stats.cpu_seconds(), time.monotonic()
    time.sleep(5)
    idle = process_stats.other_busy_cores(time.monotonic() - began, _difference(process_stats.cpu_seconds(), before))
    held = {store: round(size / sizes.parked) for store, size in _difference(rig.storage_bytes(), stored).items()}
    grown = {role: round(size / sizes.parked) for role, size in _difference(process_stats.memory_kib(), memory).items()}
    ids, _ = _run_to_end(rig, rig.accounts(50), per_second=5)
    return {
        "parked": sizes.parked,
        "parked_in_s": round(took, 1),
        "bytes_each": held,
        "process_bytes_each": grown,
        "cores_while_parked": idle,
        "fresh": _quantiles(rig.wait_times(ids)),
    }


def history_size(rig: BenchmarkSystem, sizes: argparse.Namespace) -> Figures:
    """The same burst with more and more behind it: settled payments, and a tenth as many that wait."""
    figures: Figures = {}
    there = 0
    for stored in (0, 1_000, 10_000, 100_000, 1_000_000):
        if stored:
            seed_data.insert_history(
                rig.system.engine, stored * 10 // 7, first=there * 5 // 7
            )  # 7 payments on 5 calls of 2 entries
            seed_data.insert_waiting(rig.system.engine, stored // 10, first=there // 10)
            there = stored
        for _ in range(2):  # the first one with cold caches
            _, figures[f"behind_{stored}"] = _run_to_end(rig, rig.accounts(sizes.n // 2))
    return figures


def restart(rig: BenchmarkSystem, sizes: argparse.Namespace) -> Figures:
    """A steady rate while the roles are replaced, one replica after the other: two of each worker, one endpoint."""
    for replica in ("worker2", "refresh2"):
        rig.start_replica(replica)
    count = int(sizes.rate * sizes.seconds)
    ids, _ = _run_to_end(rig, rig.accounts(count), per_second=sizes.rate)
    calm = _quantiles(rig.wait_times(ids))
    with ThreadPoolExecutor(1) as pool:
        restarted = pool.submit(_replace_all, rig)
        ids = []
        while not restarted.done() or not ids:
            ids += rig.enqueue(rig.accounts(int(sizes.rate)), per_second=sizes.rate)
        took = restarted.result()
    rig.resolved(ids)
    states = Counter(row["state"] for row in rig.payments(ids))
    later = _quantiles(rig.wait_times(ids))
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


def _replace_all(rig: BenchmarkSystem) -> Figures:
    return {
        replica: rig.replace_replica(replica) for replica in ("worker", "worker2", "refresh", "refresh2", "web", "beat")
    }


def statement(rig: BenchmarkSystem, sizes: argparse.Namespace) -> Figures:
    """What finance and the caps ask of a month with a million fee entries: seconds, the median of three."""
    seed_data.insert_history(rig.system.engine, sizes.entries)
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
    return {"entries": entries, **{f"{name}_s": _median_query_time(rig, ask) for name, ask in questions.items()}}


def _median_query_time(rig: BenchmarkSystem, ask: Callable[[Tx], Any]) -> float:
    took = []
    for _ in range(3):
        with read_only(rig.system.engine) as tx:
            start = time.monotonic()
            ask(tx)
            took.append(time.monotonic() - start)
    return round(sorted(took)[1], 2)


def _difference(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0) for name, value in after.items()}


CASES: Mapping[str, Callable[[BenchmarkSystem, argparse.Namespace], Figures]] = {
    "burst": burst,
    "paced": paced,
    "hot": hot_accounts,
    "parked": idle_waiting,
    "growth": history_size,
    "restart": restart,
    "statement": statement,
}
