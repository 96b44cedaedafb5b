"""Webhook throughput on one core compared with an empty handler, and its memory over many deliveries."""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.benchmark_system import DurablePostgres
from benchmarks.load_generator import LoadResult, closed_loop, open_loop
from benchmarks.webhook_server import EMPTY_RESPONSE
from demo.processes import Processes, assign_free_port, responds
from tests.support.databases import migrate
from tests.webhook.conftest import SECRET, sign
from webhook.paths import PATH

CONNECTIONS = 16
FORGED_SECRET = "whsec_of_a_forger"  # noqa: S105 - signs forged deliveries
ROUND_DURATION_S = 2.0
OPEN_LOOP_DURATION_S = 5.0
_numbers = itertools.count(1)


def body(count: int = 1, source: str = "SYNC") -> bytes:
    """Return the body of a delivery like the provider's, with `count` balances."""
    at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    environment = {"id": "env_1hyoxpVVFib1HngGwKAzIr", "name": "Production", "mode": "PRODUCTION", "metadata": None}
    events = [_event(next(_numbers), source, at) for _ in range(count)]
    return json.dumps({"environment": environment, "eventTypes": ["balance.created"], "events": events}).encode()


def _event(number: int, source: str, at: str) -> dict[str, Any]:
    profile = {"id": f"p_{number:022d}", "uuid": "174ec567-2492-4498-a706-504a79437235", "metadata": None}
    record = {"id": f"bal_{number:022d}", "accountId": f"acct_{number:022d}", "at": at, "source": source}
    amounts = {"available": 31.41, "current": 314.15, "limit": 3141.59}
    about = {"id": f"evt_{number:022d}", "at": at, "type": "balance.created", "metadata": {}}
    return {**about, "profile": profile, "record": {**record, **amounts}}


def signed(content: bytes, path: str = PATH, secret: str = SECRET) -> bytes:
    """Return the HTTP request of a delivery as bytes."""
    timestamp = str(int(time.time()))
    head = {
        "Host": "127.0.0.1",
        "Content-Type": "application/json",
        "Quiltt-Timestamp": timestamp,
        "Quiltt-Signature": sign(content, timestamp, secret),
        "Content-Length": len(content),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + content


class WebhookServer:
    """Webhook server on its own core."""

    def __init__(self, port: int, pid: int) -> None:
        self.port = port
        self.pid = pid

    def cpu_s(self) -> float:
        """Return the CPU seconds used by all threads of the server."""
        threads = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9

    def per_cpu_s(self, requests: Sequence[bytes], status: bytes = b"204") -> float:
        """Return the responses with this status per CPU second of a saturated server.

        Wall-clock time would include the time that other processes use on the core.
        """
        before = self.cpu_s()
        result = closed_loop(self.port, requests, connections=CONNECTIONS, seconds=ROUND_DURATION_S)
        return _without_status(result, status).statuses[status] / (self.cpu_s() - before)


def _without_status(result: LoadResult, *statuses: bytes) -> LoadResult:
    if set(result.statuses) != set(statuses):
        raise RuntimeError(f"unexpected statuses: {dict(result.statuses)}")
    return result


@contextmanager
def webhook_server() -> Iterator[WebhookServer]:
    """Start the webhook with PostgreSQL and Valkey. The first core runs the server, the others run the rest."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="payready-bench-") as folder, tempfile.TemporaryDirectory() as home:
        os.sched_setaffinity(0, cores[1:] or cores)
        server = DurablePostgres(Path(home))
        try:
            database_url, port, valkey_port = server.database(), assign_free_port(), assign_free_port()
            migrate(database_url)
            environ = {
                "PAYREADY_DATABASE_URL": database_url,
                "PAYREADY_REDIS_URL": f"redis://127.0.0.1:{valkey_port}/0",
                "PAYREADY_WEBHOOK_SECRETS": SECRET,
            }
            with Processes(Path(folder), environ) as processes:
                processes.valkey(valkey_port)
                command = f"taskset --cpu-list {cores[0]} {sys.executable} -m benchmarks.webhook_server {port}"
                process = processes.start("web", command)
                processes.wait_for("web", lambda: responds(f"http://127.0.0.1:{port}/readyz"))
                yield WebhookServer(port, process.pid)
        finally:
            server.stop()
            os.sched_setaffinity(0, cores)


def measure(sizes: argparse.Namespace) -> Mapping[str, Any]:
    """Measure the webhook and an empty handler on the same server. Each ratio is the median of its rounds."""
    with webhook_server() as running:
        measurements = {**_throughput(running, sizes.webhook_rounds), **_latency(running, sizes.webhook_rounds)}
    return {**measurements, "memory": _memory(sizes.deliveries)}


def _throughput(running: WebhookServer, rounds: int) -> Mapping[str, Any]:
    one, many = body(), body(50)
    rates: dict[str, list[float]] = {"empty": [], "routine": [], "batch": [], "forged": [], "genuine_in_flood": []}
    for _ in range(rounds):
        rates["empty"].append(running.per_cpu_s([signed(one, EMPTY_RESPONSE)]))
        rates["routine"].append(running.per_cpu_s([signed(one)]))
        rates["batch"].append(50 * running.per_cpu_s([signed(many)]))
        rates["forged"].append(running.per_cpu_s([signed(one, secret=FORGED_SECRET)], b"401"))
        rates["genuine_in_flood"].append(_signed_requests_beside_forged(running, one))
    genuine_share = [
        flooded / (routine / 2) for flooded, routine in zip(rates["genuine_in_flood"], rates["routine"], strict=True)
    ]
    return {
        "per_cpu_s": {name: round(statistics.median(values)) for name, values in rates.items()},
        "routine_to_empty": _ratio(rates["routine"], rates["empty"]),
        "batched_to_single_events": _ratio(rates["batch"], rates["routine"]),
        "genuine_half_in_a_flood_to_its_half_without": round(statistics.median(genuine_share), 2),
    }


def _signed_requests_beside_forged(running: WebhookServer, content: bytes) -> float:
    """Return the genuine deliveries per CPU second when half of the deliveries are forged."""
    pair = [signed(content), signed(content, secret=FORGED_SECRET)]
    before = running.cpu_s()
    result = closed_loop(running.port, pair * 200_000, connections=CONNECTIONS, seconds=ROUND_DURATION_S)
    return _without_status(result, b"204", b"401").statuses[b"204"] / (running.cpu_s() - before)


def _latency(running: WebhookServer, rounds: int) -> Mapping[str, Any]:
    """Measure the response times at half of the saturation rate, for the empty handler and REFRESH balances."""
    p99: dict[str, list[float]] = {"empty": [], "refresh": []}
    rates: dict[str, list[float]] = {"empty": [], "refresh": []}
    for _ in range(rounds):
        empty = [signed(body(), EMPTY_RESPONSE)]
        for name, saturating in (("empty", empty), ("refresh", _refreshes(20_000))):
            rate = closed_loop(running.port, saturating, connections=CONNECTIONS, seconds=ROUND_DURATION_S).per_second()
            requests = empty if name == "empty" else _refreshes(int(rate * OPEN_LOOP_DURATION_S))
            options: dict[str, Any] = {
                "rate": rate / 2,
                "connections": CONNECTIONS * 4,
                "seconds": OPEN_LOOP_DURATION_S,
            }
            p99[name].append(_without_status(open_loop(running.port, requests, **options), b"204").p99_ms())
            rates[name].append(rate)
    return {
        "saturated_per_s": {name: round(statistics.median(values)) for name, values in rates.items()},
        "p99_ms_at_half": {name: round(statistics.median(values), 2) for name, values in p99.items()},
        "refresh_p99_to_empty": _ratio(p99["refresh"], p99["empty"]),
    }


def _refreshes(count: int) -> list[bytes]:
    return [signed(body(source="REFRESH")) for _ in range(count)]


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2)


def _memory(deliveries: int) -> Mapping[str, Any]:
    """Measure the resident memory of a process that handles `deliveries` deliveries without HTTP."""
    command = [sys.executable, "-m", "benchmarks.webhook_memory", str(deliveries)]
    environ = {**os.environ, "PAYREADY_WEBHOOK_SECRETS": SECRET}
    measurements: Mapping[str, Any] = json.loads(
        subprocess.run(command, env=environ, check=True, stdout=subprocess.PIPE).stdout  # noqa: S603 - fixed command
    )
    return measurements
