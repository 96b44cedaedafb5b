"""Benchmark cases: each is a function of a warm system and the sizes from the command line."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

from benchmarks import process_stats, seed_data
from benchmarks.benchmark_system import ROLES, BenchmarkSystem
from benchmarks.dashboard_client import readers
from benchmarks.ledger_stats import growth_each, read_ledger_stats
from worker.ledger import cap_usage, fee_calls, fee_statement, payment_shares
from worker.ledger.engine import Tx, read_snapshot

Measurements = dict[str, Any]
READ_PAGES = ("/", "/payments", "/provider", "/fees")
"""Pages that a reader of the dashboard reads in turn."""
TAIL_TIME_S = 1.0
"""Time after the last outcome in which CPU still counts, for acknowledgements and delivery marks."""


def _quantiles(waits: Sequence[float]) -> Measurements:
    ordered = sorted(waits)
    return {f"p{q}_ms": round(ordered[min(len(ordered) - 1, len(ordered) * q // 100)], 1) for q in (50, 95, 99)}


def _run_to_end(benchmark: BenchmarkSystem, accounts: list[str], **how: Any) -> tuple[list[str], Measurements]:
    before = process_stats.cpu_seconds()
    ids = benchmark.enqueue(accounts, **how)
    benchmark.wait_until_resolved(ids)
    time.sleep(TAIL_TIME_S)
    spent = process_stats.per_1000(before, process_stats.cpu_seconds(), len(ids))
    released = benchmark.count(
        "SELECT count(*) FROM payment WHERE payment_id BETWEEN :first AND :last AND state = 'released'",
        first=ids[0],
        last=ids[-1],
    )
    return ids, {"payments": len(ids), "released": released, "cpu_s_per_1000": spent}


def burst(benchmark: BenchmarkSystem, sizes: argparse.Namespace) -> Measurements:
    """Measure a burst: payments on as many accounts, enqueued at once."""
    ids, measurements = _run_to_end(benchmark, benchmark.accounts(sizes.n))
    return {"payments_per_s": round(len(ids) / benchmark.duration_s(ids), 1), **measurements}


def paced(benchmark: BenchmarkSystem, sizes: argparse.Namespace) -> Measurements:
    """Measure payments at a steady rate, from the webhook to the outcome, with readers of the dashboard if wanted."""
    with readers(benchmark.dashboard_url, sizes.readers, READ_PAGES):
        ids, measurements = _run_to_end(
            benchmark, benchmark.accounts(int(sizes.rate * sizes.seconds)), per_second=sizes.rate
        )
    return {"per_second": sizes.rate, "readers": sizes.readers, **_quantiles(benchmark.wait_times(ids)), **measurements}


def hot_accounts(benchmark: BenchmarkSystem, sizes: argparse.Namespace) -> Measurements:
    """Measure a burst on ten accounts, whose payments share one call and its fee per account.

    Its amounts are small, because the funds of an account must suffice for all of its payments.
    """
    accounts = benchmark.accounts(10)
    ids, measurements = _run_to_end(benchmark, [accounts[number % 10] for number in range(sizes.hot)], amount="1.00")
    calls = sum(len(benchmark.system.simulator.calls(account)) for account in accounts)
    return {"payments_per_s": round(len(ids) / benchmark.duration_s(ids), 1), "calls": calls, **measurements}


def idle_waiting(benchmark: BenchmarkSystem, sizes: argparse.Namespace) -> Measurements:
    """Measure payments whose webhook never arrives: storage per payment, idle CPU, and latency of new payments."""
    memory, stored = process_stats.memory_kib(), benchmark.storage_bytes()
    accounts = benchmark.accounts(sizes.waiting, "never")
    started = time.monotonic()
    benchmark.enqueue(accounts, timeout_s=3600)
    benchmark.wait_until_called(accounts)
    elapsed_s = time.monotonic() - started
    time.sleep(10)  # for the first maintenance run over all of them
    before, began = process_stats.cpu_seconds(), time.monotonic()
    time.sleep(5)
    idle = process_stats.other_busy_cores(time.monotonic() - began, _difference(process_stats.cpu_seconds(), before))
    stored_each = {
        store: round(size / sizes.waiting) for store, size in _difference(benchmark.storage_bytes(), stored).items()
    }
    grown = {
        role: round(size / sizes.waiting) for role, size in _difference(process_stats.memory_kib(), memory).items()
    }
    ids, _ = _run_to_end(benchmark, benchmark.accounts(50), per_second=5)
    return {
        "waiting": sizes.waiting,
        "all_called_after_s": round(elapsed_s, 1),
        "bytes_each": stored_each,
        "process_bytes_each": grown,
        "cores_while_waiting": idle,
        "new_payments": _quantiles(benchmark.wait_times(ids)),
    }


def history_size(benchmark: BenchmarkSystem, sizes: argparse.Namespace) -> Measurements:
    """Measure the same burst with growing history: resolved payments, and a tenth as many waiting payments."""
    measurements: Measurements = {}
    existing = 0
    for stored in (0, 1_000, 10_000, 100_000, 1_000_000):
        if stored:
            seed_data.insert_history(
                benchmark.system.engine, stored * 10 // 7, first=existing * 5 // 7
            )  # 7 payments on 5 calls of 2 entries
            seed_data.insert_waiting(benchmark.system.engine, stored // 10, first=existing // 10)
            existing = stored
        for _ in range(2):  # the first run has cold caches
            _, measurements[f"history_{stored}"] = _run_to_end(benchmark, benchmark.accounts(sizes.n // 2))
    return measurements


def restart(benchmark: BenchmarkSystem, sizes: argparse.Namespace) -> Measurements:
    """Measure a steady rate while each replica is restarted: two of each worker, one `web`, one beat."""
    for replica in ("worker2", "refresh2"):
        benchmark.start_replica(replica)
    count = int(sizes.rate * sizes.seconds)
    ids, _ = _run_to_end(benchmark, benchmark.accounts(count), per_second=sizes.rate)
    before = _quantiles(benchmark.wait_times(ids))
    with ThreadPoolExecutor(1) as pool:
        restarted = pool.submit(_replace_all, benchmark)
        ids = []
        while not restarted.done() or not ids:
            ids += benchmark.enqueue(benchmark.accounts(int(sizes.rate)), per_second=sizes.rate)
        elapsed_s = restarted.result()
    benchmark.wait_until_resolved(ids)
    states = Counter(row["state"] for row in benchmark.payments(ids))
    during = _quantiles(benchmark.wait_times(ids))
    return {
        "per_second": sizes.rate,
        "replicas_s": elapsed_s,
        "all_s": round(sum(elapsed_s.values()), 1),
        "payments": len(ids),
        **{f"{state}": number for state, number in states.items()},
        "lost": len(ids) - states.total(),
        "before": before,
        "during": during,
        "p99_increase_ms": round(during["p99_ms"] - before["p99_ms"], 1),
    }


def _replace_all(benchmark: BenchmarkSystem) -> Measurements:
    return {
        replica: benchmark.replace_replica(replica)
        for replica in ("worker", "worker2", "refresh", "refresh2", "web", "beat")
    }


def sizing(benchmark: BenchmarkSystem, sizes: argparse.Namespace) -> Measurements:
    """Measure what a settled payment costs: bytes, WAL, updates in place, log bytes, CPU; and connections by role."""
    _run_to_end(benchmark, benchmark.accounts(sizes.n))  # vacuum frees space of it, as in a ledger that grows
    seed_data.vacuum(benchmark.system.engine)
    before, logged = read_ledger_stats(benchmark), _log_bytes(benchmark)
    ids, measurements = _run_to_end(benchmark, benchmark.accounts(sizes.n))
    after = read_ledger_stats(benchmark)
    return {
        **measurements,
        "each": growth_each(after, before, len(ids)),
        "log_bytes_each": {
            role: round(size / len(ids), 1) for role, size in _difference(_log_bytes(benchmark), logged).items()
        },
        "connections": process_stats.connections(int(benchmark.system.engine.url.port or 0)),
        "memory_mib": {role: round(size / 2**20) for role, size in process_stats.memory_kib().items()},
    }


def _log_bytes(benchmark: BenchmarkSystem) -> Mapping[str, float]:
    return {role: benchmark.system.processes.log_of(role).stat().st_size for role in ROLES}


def statement(benchmark: BenchmarkSystem, sizes: argparse.Namespace) -> Measurements:
    """Measure the fee statements and cap queries of a month of fee entries: the median seconds of three runs."""
    seed_data.insert_history(benchmark.system.engine, sizes.entries)
    since, until = datetime(2026, 10, 1, tzinfo=UTC), datetime(2026, 11, 1, tzinfo=UTC)
    queries: dict[str, Callable[[Tx], Any]] = {
        "by_price": lambda tx: (
            fee_statement.statement_lines(tx, since, until, "price"),
            fee_statement.savings_by_currency(tx, since, until),
        ),
        "by_day": lambda tx: fee_statement.statement_lines(tx, since, until, "day"),
        "by_account": lambda tx: fee_statement.statement_lines(tx, since, until, "account"),
        "by_payment": lambda tx: sum(1 for _ in payment_shares.payment_shares_and_unshared_fees(tx, since, until)),
        "pending_calls": lambda tx: fee_calls.pending_calls(tx, until),
        "cap_of_a_month": lambda tx: cap_usage.total_non_void_fees(tx, "USD", since, until),
        "cap_of_a_day": lambda tx: cap_usage.total_non_void_fees(tx, "USD", until - timedelta(days=1), until),
    }
    entries = benchmark.count("SELECT count(*) FROM fee_entry")
    return {
        "entries": entries,
        **{f"{name}_s": _median_query_time(benchmark, query) for name, query in queries.items()},
    }


def reconcile(benchmark: BenchmarkSystem, sizes: argparse.Namespace) -> Measurements:
    """Measure the reconciliation of a month's invoice by call with the ledger, in a process of its own."""
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        seed_data.insert_calls_and_write_invoice(benchmark.system.engine, sizes.lines, file)
        file.flush()
        command = [sys.executable, "-m", "benchmarks.reconcile_month", benchmark.system.database_url, file.name]
        return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))  # noqa: S603


def _median_query_time(benchmark: BenchmarkSystem, query: Callable[[Tx], Any]) -> float:
    elapsed_s = []
    for _ in range(3):
        with read_snapshot(benchmark.system.engine) as tx:
            start = time.monotonic()
            query(tx)
            elapsed_s.append(time.monotonic() - start)
    return round(sorted(elapsed_s)[1], 2)


def _difference(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0) for name, value in after.items()}


CASES: Mapping[str, Callable[[BenchmarkSystem, argparse.Namespace], Measurements]] = {
    "burst": burst,
    "paced": paced,
    "hot_accounts": hot_accounts,
    "idle_waiting": idle_waiting,
    "history_size": history_size,
    "restart": restart,
    "sizing": sizing,
    "statement": statement,
    "reconcile": reconcile,
}
