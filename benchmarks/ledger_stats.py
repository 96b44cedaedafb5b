"""What PostgreSQL counts of the ledger: bytes, WAL, and updates in place (HOT)."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.benchmark_system import BenchmarkSystem

STATISTICS_DELAY_S = 11
"""An idle session of PostgreSQL reports its counts after 10 s."""
_SIZES = """SELECT relname, pg_table_size(oid) AS heap, pg_indexes_size(oid) AS indexes
    FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"""
_INDEX_SIZES = """SELECT relname, pg_relation_size(oid) AS size
    FROM pg_class WHERE relkind = 'i' AND relnamespace = 'public'::regnamespace"""
_UPDATES = "SELECT relname, n_tup_upd AS updated, n_tup_hot_upd AS in_place FROM pg_stat_user_tables"
_WAL = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0') AS bytes, wal_fpi AS page_images FROM pg_stat_wal"


@dataclass(frozen=True, kw_only=True)
class LedgerStats:
    """Counts at one time. Bytes are of files: they include free space."""

    heap_bytes: Mapping[str, int]
    index_bytes: Mapping[str, int]
    """Bytes of all indexes of a table."""
    bytes_by_index: Mapping[str, int]
    updates: Mapping[str, int]
    updates_in_place: Mapping[str, int]
    """Updates that wrote no index entry (HOT)."""
    wal_bytes: int
    wal_page_images: int
    """Pages of 8 KiB that were written whole, because they changed first after a checkpoint."""


def read_ledger_stats(benchmark: BenchmarkSystem) -> LedgerStats:
    """Wait until all sessions have reported, and return the counts."""
    time.sleep(STATISTICS_DELAY_S)
    sizes, updates = benchmark.system.rows(_SIZES), benchmark.system.rows(_UPDATES)
    [wal] = benchmark.system.rows(_WAL)
    return LedgerStats(
        heap_bytes={row["relname"]: row["heap"] for row in sizes},
        index_bytes={row["relname"]: row["indexes"] for row in sizes},
        bytes_by_index={row["relname"]: row["size"] for row in benchmark.system.rows(_INDEX_SIZES)},
        updates={row["relname"]: row["updated"] for row in updates},
        updates_in_place={row["relname"]: row["in_place"] for row in updates},
        wal_bytes=int(wal["bytes"]),
        wal_page_images=wal["page_images"],
    )


def growth_each(after: LedgerStats, before: LedgerStats, payments: int) -> dict[str, object]:
    """Return the bytes, WAL and updates between two readings, for each payment."""

    def each(now: Mapping[str, int], then: Mapping[str, int]) -> dict[str, float]:
        grown = {name: round((count - then[name]) / payments, 2) for name, count in sorted(now.items())}
        return {name: amount for name, amount in grown.items() if amount}

    heap, indexes = each(after.heap_bytes, before.heap_bytes), each(after.index_bytes, before.index_bytes)
    return {
        "bytes": round(sum(heap.values()) + sum(indexes.values())),
        "heap_bytes": heap,
        "index_bytes": indexes,
        "bytes_by_index": each(after.bytes_by_index, before.bytes_by_index),
        "wal_bytes": round((after.wal_bytes - before.wal_bytes) / payments),
        "wal_page_images": round((after.wal_page_images - before.wal_page_images) / payments, 3),
        "updates": each(after.updates, before.updates),
        "updates_in_place": each(after.updates_in_place, before.updates_in_place),
    }
