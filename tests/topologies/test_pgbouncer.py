"""PgBouncer in front of PostgreSQL: transaction pooling with 10 server connections, and otherwise its defaults."""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy import bindparam, text

from demo.processes import ROOT, Processes, assign_free_port, procfile
from tests.migrations_in_step import alembic
from tests.support.load_assertions import (
    assert_ledger_matches_provider,
    assert_one_outcome_each,
    assert_shares_add_up,
    have_outcomes,
    jobs,
)
from tests.support.servers import Postgres
from tests.support.system import ROLES, eventually, system, wait_until
from tests.topologies.pgbouncer import SERVER, UNAVAILABLE_REASON, PgBouncer, pgbouncer
from webhook.readiness import CHECK_INTERVAL_S
from worker.ledger.engine import DATABASE_UNAVAILABLE, Engine, UnconfiguredPooler, open_engine, transaction
from worker.ledger.server_state import find_write_problem

pytestmark = [pytest.mark.topology, pytest.mark.skipif(SERVER is None, reason=UNAVAILABLE_REASON)]

WITH_POOLER = {"PAYREADY_DATABASE_POOLER": "transaction"}
IGNORING_OPTIONS: dict[str, Any] = {"ignore_startup_parameters": "options"}
SERVER_CONNECTIONS = 10
MAX_RESPONSE_S = 5
"""Time in which `/readyz` responds, whatever hangs."""
UNCONFIGURED = "A connection pooler is in front of PostgreSQL: set PAYREADY_DATABASE_POOLER=transaction."


@pytest.fixture
def pooled(postgres_server: Postgres) -> Iterator[PgBouncer]:
    """Run PgBouncer with a single server connection, which all clients share, in front of an empty database."""
    with pgbouncer(postgres_server.database(), connections=1) as server:
        yield server


@pytest.mark.timeout(240)
def test_each_of_600_payments_has_one_outcome_and_exact_fees(tmp_path: Path, postgres_server: Postgres) -> None:
    """Through all roles and the migration. PgBouncer opens no more server connections than it may."""
    direct = postgres_server.database()
    longer = {"PAYREADY_REFRESH_WINDOW_S": "60", "PAYREADY_UNCERTAIN_GRACE_S": "10"}
    with (
        pgbouncer(direct, connections=SERVER_CONNECTIONS) as pooler,
        system(tmp_path, pooler.url, *ROLES, **WITH_POOLER, **longer) as running,
    ):
        running.start_service()
        sent = jobs("mix", 600, 200, amount="2.00", timeout_s=90, max_balance_age_s=3600)
        running.initiate_many(sent, linked=True)
        wait_until(have_outcomes(running, len(sent)), 120, "all payments are resolved")
        assert len(server_connections(direct)) <= SERVER_CONNECTIONS
        running.simulator.wait_for_webhooks()
        wait_until(
            lambda: running.rows("SELECT 1 FROM balance WHERE due_at IS NOT NULL") == [], 20, "all balances are applied"
        )
        assert_one_outcome_each(running, {str(job["payment_id"]) for job in sent})
        received = Counter(line["args"][1] for line in running.callbacks_received())
        assert received == Counter(str(job["payment_id"]) for job in sent)
        assert_ledger_matches_provider(running, calls_per_account=1)
        assert {totals.pending for totals in running.fee_totals().values()} == {0}
        assert_shares_add_up(running)


def server_connections(database_url: str) -> list[int]:
    query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with psycopg.connect(database_url) as connection:
        return [pid for (pid,) in connection.execute(query)]


def test_prepared_statements_of_two_clients_do_not_mix(pooled: PgBouncer) -> None:
    """Both share one server connection, on which their own names of prepared statements would be the same."""
    number = text("SELECT CAST(:given AS bigint) AS value").bindparams(bindparam("given"))
    word = text("SELECT CAST(:given AS text) AS value").bindparams(bindparam("given"))
    with ExitStack() as stack:
        first, second = (open_pooled(stack, pooled) for _ in range(2))
        for given in range(20):
            for engine, statement, value in ((first, number, given), (second, word, f"bal_{given}")):
                with transaction(engine) as tx:
                    found = tx.send(statement, {"given": value}, read=lambda rows: rows[0].value)
                    assert found.result() == value


def open_pooled(stack: ExitStack, pooler: PgBouncer, options: str = "") -> Engine:
    engine = open_engine(pooler.url + options, connections=2, pooler="transaction")
    stack.callback(engine.dispose)
    return engine


def test_settings_do_not_leak_to_other_clients(pooled: PgBouncer) -> None:
    """A setting of one transaction ends with it, although another client gets the same session next."""
    show = text("SELECT current_setting('statement_timeout') AS timeout, current_setting('search_path') AS path")
    with ExitStack() as stack:
        first = open_pooled(stack, pooled, "?options=-csearch_path%3Dpay%20-cstatement_timeout%3D9s")
        second = open_pooled(stack, pooled)
        for engine, expected in ((first, ("9s", "pay")), (second, ("15s", '"$user", public'))) * 3:
            with transaction(engine) as tx:
                assert tuple(tx.send(show, read=lambda rows: rows[0]).result()) == expected
        with first.connect() as connection:
            assert connection.execute(show).one()[0] == "0", "outside of a transaction, nothing is set"


def test_migration_runs_through_the_pooler(pooled: PgBouncer) -> None:
    """Also into the schema of the address."""
    with psycopg.connect(pooled.url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA pay")
    completed = release(pooled.url + "?options=-csearch_path%3Dpay", **WITH_POOLER)
    assert completed.returncode == 0, completed.stderr
    with psycopg.connect(pooled.url, autocommit=True) as connection:
        query = "SELECT DISTINCT schemaname FROM pg_tables WHERE tablename IN ('payment', 'alembic_version')"
        assert connection.execute(query).fetchall() == [("pay",)]


def release(database_url: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run the role `release`."""
    variables = {"PATH": str(Path(sys.executable).parent), "PAYREADY_DATABASE_URL": database_url, **environ}
    command = ["alembic", "upgrade", "head"]
    return subprocess.run(command, cwd=ROOT, env=variables, check=False, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("options", [{}, IGNORING_OPTIONS], ids=["refuses options", "ignores options"])
def test_release_without_the_setting_says_what_to_set(postgres_server: Postgres, options: dict[str, Any]) -> None:
    """With both ways in which PgBouncer can treat the settings of a session. No table is created."""
    direct = postgres_server.database()
    with pgbouncer(direct, **options) as pooler:
        completed = release(pooler.url)
        assert (completed.returncode, "Traceback" in completed.stderr) == (1, False)
        assert completed.stderr.endswith(f"payready cannot start: {UNCONFIGURED}\n")
        with pytest.raises(UnconfiguredPooler):
            find_write_problem(open_engine(pooler.url, connections=1))
    with psycopg.connect(direct) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)


@pytest.mark.parametrize("options", [{}, IGNORING_OPTIONS], ids=["refuses options", "ignores options"])
def test_doctor_without_the_setting_says_what_to_set(postgres_server: Postgres, options: dict[str, Any]) -> None:
    """It does not propose to start the server, which runs."""
    direct = postgres_server.database()
    alembic(direct, "upgrade", "head")
    with pgbouncer(direct, **options) as pooler:
        variables = {"PATH": str(Path(sys.executable).parent), "PAYREADY_DATABASE_URL": pooler.url}
        completed = subprocess.run(
            ["payready", "doctor"], cwd=ROOT, env=variables, check=False, capture_output=True, text=True, timeout=60
        )
        address = pooler.url.partition("@")[2]
    assert (
        f"✗ database: {address} is a connection pooler: statements would reach sessions of other clients\n"
        "    set PAYREADY_DATABASE_POOLER=transaction\n"
    ) in completed.stdout


def test_lost_pooler_is_an_unavailable_database(pooled: PgBouncer) -> None:
    """After its restart, the next transaction succeeds."""
    one = text("SELECT 1 AS one")

    def lose_pooler(engine: Engine) -> None:
        with transaction(engine) as tx:
            tx.send(one, read=len).result()
            pooled.kill()
            tx.send(one, read=len).result()

    with ExitStack() as stack:
        engine = open_pooled(stack, pooled)
        with pytest.raises(DATABASE_UNAVAILABLE):
            lose_pooler(engine)
        pooled.start()
        with transaction(engine) as tx:
            assert tx.send(one, read=len).result() == 1


def test_transaction_that_waits_too_long_for_a_server_is_an_unavailable_database(postgres_server: Postgres) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(pgbouncer(postgres_server.database(), connections=1, query_wait_timeout=1))
        first, second = (open_pooled(stack, server) for _ in range(2))
        one = text("SELECT 1 AS one")
        with transaction(first) as tx:
            tx.send(one, read=len).result()
            with pytest.raises(DATABASE_UNAVAILABLE, match="query_wait_timeout"), transaction(second) as late:
                late.send(one, read=len).result()


def test_web_is_not_ready_within_5_s_while_no_server_is_free(postgres_server: Postgres, tmp_path: Path) -> None:
    """PgBouncer lets the check wait for 120 s. Afterwards `web` is ready again."""
    direct, port = postgres_server.database(), assign_free_port()
    alembic(direct, "upgrade", "head")
    with ExitStack() as stack:
        pooler = stack.enter_context(pgbouncer(direct, connections=1))
        environ = {"PAYREADY_DATABASE_URL": pooler.url, "PAYREADY_WEBHOOK_PORT": str(port), "PAYREADY_DRAIN_S": "0"}
        processes = stack.enter_context(Processes(tmp_path, {**environ, **WITH_POOLER}))
        processes.start("web", procfile()["web"])
        url = f"http://127.0.0.1:{port}/readyz"
        assert eventually(lambda: _response(url) == (200, "ready"))
        other = open_pooled(stack, pooler)
        with transaction(other) as tx:
            tx.send(text("SELECT 1 AS one"), read=len).result()
            time.sleep(CHECK_INTERVAL_S)  # the last result does not count any more
            for limit_s in (MAX_RESPONSE_S, 1):
                started_at = time.monotonic()
                assert _response(url) == (503, "not ready: the database does not respond")
                assert time.monotonic() - started_at < limit_s
        assert eventually(lambda: _response(url) == (200, "ready"))


def _response(url: str) -> tuple[int, str] | None:
    try:
        response = httpx.get(url, timeout=60)
    except httpx.ConnectError:
        return None
    return response.status_code, response.text
