"""Measure the pages of the dashboard on a large ledger: server time, bytes, and the slowest SQL statement of each.

The first request of each page is measured in processes of the role that have just started, one for each request.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from sqlalchemy import Engine, text

from benchmarks.dashboard_client import log_in, login_settings
from benchmarks.week_of_payments import insert_week
from demo.processes import Processes, assign_free_port, procfile, responds
from tests.migrations_in_step import alembic
from tests.support.servers import Postgres
from worker.ledger.engine import open_engine

REQUESTS = 20
"""Repeated requests of each page, after a first one."""
MAX_REPEAT_S = 10.0
"""Time after which a slow page is not repeated again."""
_SLOWEST = """SELECT max_exec_time, query FROM pg_stat_statements
    WHERE query NOT ILIKE '%pg_stat_statements%' ORDER BY max_exec_time DESC LIMIT 1"""
_STATEMENTS = "SELECT sum(calls) FROM pg_stat_statements WHERE query NOT ILIKE '%pg_stat_statements%'"


class _ObservedPostgres(Postgres):
    """A server that keeps statistics of its statements."""

    def _command(self, program: str, *options: str) -> list[str]:
        observed = ("-c", "shared_preload_libraries=pg_stat_statements") if program == "postgres" else ()
        return super()._command(program, *options, *observed)


def _pages(payments: int) -> Mapping[str, str]:
    """Return the measured pages by name."""
    some = payments * 7 // 10
    month = f"{datetime.now(UTC) - timedelta(days=3.5):%Y-%m}"  # has more than half of the week
    return {
        "now": "/",
        "payments": "/payments",
        "payments_of_account": f"/payments?account=acct_{some % 50_000}",
        "payments_waiting": "/payments?state=waiting",
        "payments_by_reason": "/payments?reason=timeout",
        "payments_by_metadata": f"/payments?metadata_key=order&metadata_value=A-{some}",
        "payment": f"/payments/pay_{some}",
        "payment_waiting": "/payments/pay_waiting77",
        "provider_hour": "/provider?span=hour",
        "provider_day": "/provider?span=day",
        "provider_week": "/provider?span=week",
        "fees": f"/fees?month={month}",
        "fees_csv_by_day": f"/fees.csv?month={month}&by=day",
        "fees_csv_by_account": f"/fees.csv?month={month}&by=account",
        "fees_csv_by_price": f"/fees.csv?month={month}&by=price",
        "fees_pending": "/fees/pending",
        "dead_letters": "/dead-letters",
        "quarantine": "/quarantine",
        "audit": "/audit",
    }


def measure(sizes: argparse.Namespace) -> dict[str, Any]:
    """Request each page on a ledger with a week of payments, in new processes of the role and repeatedly in one."""
    with tempfile.TemporaryDirectory(prefix="payready-bench-") as home:
        server = _ObservedPostgres(Path(home))
        try:
            url = server.database()
            alembic(url, "upgrade", "head")
            engine = open_engine(url, connections=2)
            insert_week(engine, payments=sizes.payments, waiting=sizes.dashboard_waiting)
            with engine.begin() as connection:
                connection.execute(text("CREATE EXTENSION pg_stat_statements"))
            measured = measure_pages(url, engine, _pages(sizes.payments), starts=sizes.dashboard_starts)
            engine.dispose()
        finally:
            server.stop()
    return {"payments": sizes.payments, "waiting": sizes.dashboard_waiting, **measured}


def measure_pages(url: str, engine: Engine, pages: Mapping[str, str], *, starts: int) -> dict[str, dict[str, Any]]:
    """Return the figures of each page of a database that has the extension `pg_stat_statements`."""
    first = {name: _measure_first_requests(url, path, starts) for name, path in pages.items()}
    with _dashboard(url) as client:
        return {name: first[name] | _measure_page(client, engine, path) for name, path in pages.items()}


def _measure_first_requests(url: str, path: str, starts: int) -> dict[str, float]:
    """Start the role anew for each request. Its client has logged in, so that one page was rendered before."""
    times = []
    for _ in range(starts):
        with _dashboard(url) as client:
            times.append(_timed(client, path)[0])
    return {"first_ms": round(median(times), 1), "first_max_ms": max(times)}


@contextmanager
def _dashboard(database_url: str) -> Iterator[httpx.Client]:
    """Run the role, and yield a client that has logged in."""
    port, metrics_port, valkey_port = assign_free_port(), assign_free_port(), assign_free_port()
    environ = {
        "PAYREADY_DATABASE_URL": database_url,
        "PAYREADY_REDIS_URL": f"redis://127.0.0.1:{valkey_port}/0",
        "PAYREADY_DASHBOARD_PORT": str(port),
        "PAYREADY_METRICS_PORT": str(metrics_port),
        **login_settings(),
    }
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder, Processes(Path(folder), environ) as processes:
        processes.valkey(valkey_port)
        processes.start("dashboard", procfile()["dashboard"])
        processes.wait_for("dashboard", lambda: responds(f"{url}/readyz"))
        with httpx.Client(base_url=url, timeout=60) as client:
            log_in(client)
            yield client


def _measure_page(client: httpx.Client, engine: Engine, path: str) -> dict[str, Any]:
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_stat_statements_reset()"))
    _, response = _timed(client, path)
    times = sorted(_repeat(client, path))
    with engine.begin() as connection:
        slowest = connection.execute(text(_SLOWEST)).one_or_none()
        statements = connection.scalar(text(_STATEMENTS)) or 0
    return {
        "status": response.status_code,
        "p50_ms": times[len(times) // 2],
        "max_ms": times[-1],
        "kb": round(len(response.content) / 1000, 1),
        "statements": round(float(statements) / (len(times) + 1), 1),
        "slowest_statement_ms": 0 if slowest is None else round(slowest.max_exec_time, 1),
        "slowest_statement": "" if slowest is None else " ".join(slowest.query.split())[:160],
    }


def _repeat(client: httpx.Client, path: str) -> Iterator[float]:
    """Yield the milliseconds of `REQUESTS` requests, or of fewer slow ones."""
    started = time.monotonic()
    for _ in range(REQUESTS):
        yield _timed(client, path)[0]
        if time.monotonic() - started > MAX_REPEAT_S:
            break


def _timed(client: httpx.Client, path: str) -> tuple[float, httpx.Response]:
    """Return the milliseconds until the whole response was received on the loopback interface, and the response."""
    start = time.perf_counter()
    response = client.get(path)
    return round((time.perf_counter() - start) * 1000, 1), response
