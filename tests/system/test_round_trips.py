"""Budgets of round trips to PostgreSQL and Redis for a plain payment, counted exactly between the real processes.

Each role reaches each server through a proxy of its own, which counts the turns of the connections. Beat does not run.
Not counted are the setup of connections, pings and heartbeats, and what a process does at most once a second for all of
its payments: the batch of task events, and a fetch that returns no message but may acknowledge some.
A payment that comes alone is counted several times, and the median is asserted: background work falls into few of these
times. The payments service and the test reach the servers directly.
"""

import hashlib
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from tasks import redis_source
from tests.support.round_trips import CountingProxy, RoundTrip
from tests.support.servers import Postgres
from tests.support.system import System, system, wait_until

pytestmark = pytest.mark.slow

ROLES = ("web", "worker", "refresh")
SQL_BUDGET, REDIS_BUDGET = 10, 8
"""Round trips for a plain payment that comes alone, from its job to the mark of its delivered outcome."""
BATCH_SIZE = 50
SQL_BUDGET_IN_BATCH, REDIS_BUDGET_IN_BATCH = 3, 2
"""Round trips for each payment of a batch. A busy machine forms smaller batches: 1.3 of both were seen at load 16."""
TIMES_ALONE = 5
_FETCH_DIGEST = hashlib.sha1(redis_source._FETCH.encode(), usedforsecurity=False).hexdigest().encode()
_CHECK_OF_A_NEW_CONNECTION = "SELECT pg_backend_pid()"
_SETUP = re.compile(rb"PING|HELLO|CLIENT|AUTH|SELECT|SCRIPT|SUBSCRIBE|UNSUBSCRIBE|PSUBSCRIBE|INFO|COMMAND")


@dataclass(frozen=True)
class Counted:
    """The round trips of one role to one server."""

    role: str
    server: str
    proxy: CountingProxy

    def texts(self, start: int) -> list[str]:
        """Return a short text for each counted round trip since this number."""
        trips = self.proxy.round_trips
        if self.server == "redis":
            found = [_describe_redis(trip) for trip in trips[start:]]
        else:
            prepared: dict[tuple[int, str], str] = {}
            found = [_describe_sql(trip, prepared) for trip in trips][start:]
        return [text for text in found if text]


def _describe_sql(trip: RoundTrip, prepared: dict[tuple[int, str], str]) -> str:
    """Return the statements of PostgreSQL's protocol in a request. `prepared` has those of the connections by name."""
    request, at, found = bytes(trip.request), 0, []
    while at < len(request) and request[at]:  # the startup message has no type
        end = at + 1 + int.from_bytes(request[at + 1 : at + 5])
        kind, body = request[at : at + 1], request[at + 5 : end].split(b"\0")
        if kind == b"P":
            prepared[trip.connection, body[0].decode()] = " ".join(body[1].decode().split())
        elif kind == b"B":
            found.append(prepared[trip.connection, body[1].decode()])
        elif kind == b"Q":
            found.append(body[0].decode())
        at = end
    return " + ".join(_short(statement) for statement in found if statement != _CHECK_OF_A_NEW_CONNECTION)


def _short(statement: str) -> str:
    table = re.search(r"(?:FROM|INTO|UPDATE) (\w+)", statement)
    return statement.split(" ", 1)[0] + (f" {table[1]}" if table else "")


def _describe_redis(trip: RoundTrip) -> str:
    """Return the commands of a request that are counted."""
    found = Counter[str]()
    for command in _commands(bytes(trip.request)):
        text = " ".join(word.decode(errors="replace")[-24:] for word in command[:2])
        if command[1:2] == [_FETCH_DIGEST]:
            text = "" if bytes(trip.response).startswith(b"*0\r\n") else "fetch"
        elif _SETUP.fullmatch(command[0].upper()) or text.endswith(("worker.heartbeat", "task.multi")):
            continue
        found[text] += 1
    del found[""]
    return " + ".join(f"{count} {text}" if count > 1 else text for text, count in found.items())


def _commands(request: bytes) -> list[list[bytes]]:
    """Return the commands of a request in the Redis protocol."""
    commands, at = [], 0
    while at < len(request):
        end = request.index(b"\r\n", at)
        count, at = int(request[at + 1 : end]), end + 2
        command = []
        for _ in range(count):
            end = request.index(b"\r\n", at)
            length = int(request[at + 1 : end])
            command.append(request[end + 2 : end + 2 + length])
            at = end + 4 + length
        commands.append(command)
    return commands


@dataclass(frozen=True)
class CountedSystem:
    """payready behind the proxies."""

    payready: System
    pairs: list[Counted]

    def run(self, payment_ids: list[str]) -> "Usage":
        """Run payments until their outcomes are delivered and marked. Return their round trips."""
        self._wait_until_quiet()
        starts = [len(pair.proxy.round_trips) for pair in self.pairs]
        with self.payready.service.producer_or_acquire() as producer, producer.batch(max_size=len(payment_ids)):
            for payment_id in payment_ids:
                account_id, options = f"acct_prompt{payment_id}", {"producer": producer}
                self.payready.initiate(payment_id, account_id, amount="25.00", options=options)
        marked = "SELECT 1 FROM outcome_delivery WHERE delivered_at IS NOT NULL AND payment_id = ANY (:ids)"
        wait_until(lambda: len(self.payready.rows(marked, ids=payment_ids)) == len(payment_ids), 30, "all are marked")
        self._wait_until_quiet()
        texts = {(pair.role, pair.server): pair.texts(start) for pair, start in zip(self.pairs, starts, strict=True)}
        return Usage(texts=texts, payments=len(payment_ids))

    def _wait_until_quiet(self) -> None:
        """Wait until no role has made a counted round trip for half a second."""
        while True:
            starts = [len(pair.proxy.round_trips) for pair in self.pairs]
            time.sleep(0.5)
            if not any(pair.texts(start) for pair, start in zip(self.pairs, starts, strict=True)):
                return


@dataclass(frozen=True)
class Usage:
    """Round trips of payments, as short texts by role and server."""

    texts: dict[tuple[str, str], list[str]]
    payments: int

    def total(self, server: str) -> float:
        """Return the number of round trips for each payment."""
        return sum(len(found) for (_, of), found in self.texts.items() if of == server) / self.payments

    def __str__(self) -> str:
        lines = []
        for (role, server), found in self.texts.items():
            lines.append(f"{role} to {server}: {len(found)}")
            lines += [f"    {count} x {text}" for text, count in Counter(found).items()]
        return "\n".join(lines)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres) -> Iterator[CountedSystem]:
    """Run the roles behind the proxies. The first payments open connections and prepare statements."""
    database_url = postgres_server.database()
    folder = tmp_path_factory.mktemp("round_trips")
    with system(folder, database_url, "web") as payready, ExitStack() as stack:
        payready.kill("web")
        pairs = []
        for role in ROLES:
            sql, redis = (
                stack.enter_context(closing(CountingProxy(urlsplit(url).port or 0)))
                for url in (database_url, payready.redis_url)
            )
            pairs += [Counted(role, "sql", sql), Counted(role, "redis", redis)]
            payready.start(
                role,
                PAYREADY_DATABASE_URL=sql.through(database_url),
                PAYREADY_REDIS_URL=redis.through(payready.redis_url),
            )
        running = CountedSystem(payready, pairs)
        for number in range(8):
            running.run([f"warm{number}"])
        yield running


def test_plain_payment_alone_keeps_its_budgets(counted: CountedSystem) -> None:
    usages = [counted.run([f"alone{number}"]) for number in range(TIMES_ALONE)]
    by_server = {
        server: sorted(usages, key=lambda usage: usage.total(server))[TIMES_ALONE // 2] for server in ("sql", "redis")
    }
    totals = {server: usage.total(server) for server, usage in by_server.items()}
    breakdown = "\n".join(map(str, by_server.values()))
    assert totals["sql"] <= SQL_BUDGET, f"{totals}\n{breakdown}"
    assert totals["redis"] <= REDIS_BUDGET, f"{totals}\n{breakdown}"


def test_batch_of_payments_keeps_its_budgets(counted: CountedSystem) -> None:
    usages = [counted.run([f"batch{number}x{n}" for n in range(BATCH_SIZE)]) for number in range(3)]
    usage = sorted(usages, key=lambda usage: usage.total("sql"))[1]
    totals = {server: usage.total(server) for server in ("sql", "redis")}
    assert totals["sql"] <= SQL_BUDGET_IN_BATCH, f"{totals}\n{usage}"
    assert totals["redis"] <= REDIS_BUDGET_IN_BATCH, f"{totals}\n{usage}"
