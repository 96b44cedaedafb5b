"""Arguments of connections to PostgreSQL: what the address says, merged with what payready needs."""

from collections.abc import Iterator

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from sqlalchemy import text

from config.settings import ConfigurationError
from tests.support.servers import Postgres
from worker.ledger.engine import Engine, open_engine, read_snapshot, transaction
from worker.ledger.postgres_connections import SETTINGS, Pooler, connections_to

ADDRESS = "postgresql://payready:s3cret@db/pay"
POOLERS: tuple[Pooler, ...] = ("none", "transaction")


def arguments(url: str, pooler: Pooler = "none") -> dict[str, object]:
    return dict(connections_to(url, SETTINGS, pooler=pooler).arguments)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_address_is_read_as_by_libpq(scheme: str) -> None:
    found = arguments(f"{scheme}://user:p%40ss@db:6543/pay?sslmode=verify-full&sslrootcert=/ca.pem")
    expected = {"user": "user", "password": "p@ss", "host": "db", "port": "6543", "dbname": "pay"}
    assert found.items() >= {**expected, "sslmode": "verify-full", "sslrootcert": "/ca.pem"}.items()
    assert (found["application_name"], found["connect_timeout"]) == ("payready", 5)
    assert "target_session_attrs" not in found


def test_option_of_the_address_replaces_ours() -> None:
    found = arguments(f"{ADDRESS}?connect_timeout=2&application_name=pay&keepalives_idle=60")
    assert (found["connect_timeout"], found["application_name"], found["keepalives_idle"]) == ("2", "pay", "60")


@pytest.mark.parametrize("url", ["postgresql://u@h1:1,h2:2/db", "postgresql://u@/db?host=h1,h2&port=1,2"])
def test_one_of_several_hosts_must_accept_writes(url: str) -> None:
    """Unless the address says otherwise."""
    found = arguments(url)
    assert (found["host"], found["port"], found["target_session_attrs"]) == ("h1,h2", "1,2", "read-write")
    more = "&" if "?" in url else "?"
    assert arguments(f"{url}{more}target_session_attrs=any")["target_session_attrs"] == "any"


@pytest.mark.parametrize("url", ["postgresql:///db?host=/run/postgresql", "postgresql://%2Frun%2Fpostgresql/db"])
def test_unix_socket_is_accepted(url: str) -> None:
    assert arguments(url)["host"] == "/run/postgresql"


def test_options_of_the_address_follow_ours() -> None:
    options = str(arguments(f"{ADDRESS}?options=-csearch_path%3Dpay%20-clock_timeout%3D9s")["options"])
    assert options.startswith("-c timezone=UTC -c lock_timeout=5s ")
    assert options.endswith(" -csearch_path=pay -clock_timeout=9s")


def test_transaction_pooler_gets_neither_options_nor_prepared_statements() -> None:
    common = connections_to(f"{ADDRESS}?options=-csearch_path%3Dpay", SETTINGS, pooler="transaction")
    assert "options" not in common.arguments
    assert common.arguments["prepare_threshold"] is None
    assert "set_config('statement_timeout', '15s', true)" in common.transaction_settings
    assert common.transaction_settings.endswith("set_config('search_path', 'pay', true)")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("-c search_path=pay", "'search_path', 'pay'"),
        ("--search-path=pay", "'search_path', 'pay'"),
        (r"-c search_path=pay,\ public", "'search_path', 'pay, public'"),
        ("-capp.tag=o'neil", "'app.tag', 'o''neil'"),
        ("-c lock_timeout=9s", "'lock_timeout', '9s'"),
    ],
)
def test_transaction_applies_options_of_the_address(options: str, expected: str) -> None:
    common = connections_to(make_conninfo(host="db", options=options), SETTINGS, pooler="transaction")
    assert f"set_config({expected}, true)" in common.transaction_settings
    assert common.transaction_settings.count("lock_timeout") == 1


@pytest.mark.parametrize("end", ["%zz", "?prepare_threshold=0", "?sslmode"])
def test_error_of_an_address_quotes_no_password(end: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^PAYREADY_DATABASE_URL: libpq cannot read the address; ") as raised:
        open_engine(ADDRESS + end, connections=1)
    assert "s3cret" not in str(raised.value)


@pytest.fixture(params=POOLERS)
def searching(request: pytest.FixtureRequest, postgres_server: Postgres) -> Iterator[Engine]:
    """Open a database whose address has `options`."""
    url = postgres_server.database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA pay")
    engine = open_engine(f"{url}?options=-csearch_path%3Dpay", connections=1, pooler=request.param)
    yield engine
    engine.dispose()


def test_every_transaction_has_all_settings(searching: Engine) -> None:
    """In the first and in later transactions, of `Tx` and of snapshots, and with the options of the address."""
    names = [*SETTINGS, "search_path"]
    show = text("SELECT " + ", ".join(f"current_setting('{name}')" for name in names))
    expected = [*SETTINGS.values(), "pay"]
    in_snapshot = [{"off": "on"}.get(value, value) for value in expected]
    for _ in range(2):
        with transaction(searching) as tx:
            assert [*tx.send(show, read=lambda rows: rows[0]).result()] == expected
        with transaction(searching) as tx:
            assert [*tx.execute(show).one()] == expected
        with read_snapshot(searching) as tx:
            assert [*tx.send(show, read=lambda rows: rows[0]).result()] == in_snapshot


def test_table_lands_in_the_schema_of_the_address(searching: Engine) -> None:
    with transaction(searching) as tx:
        tx.execute(text("CREATE TABLE landed (id int)"))
        assert tx.scalar(text("SELECT schemaname FROM pg_tables WHERE tablename = 'landed'")) == "pay"


def test_prepared_statements_are_used_without_a_pooler_only(postgres_server: Postgres) -> None:
    for pooler, expected in zip(POOLERS, (True, False), strict=True):
        engine = open_engine(postgres_server.database(), connections=1, pooler=pooler)
        for _ in range(8):
            with transaction(engine) as tx:
                tx.send(_ONE, read=len).result()
        with transaction(engine) as tx:
            assert bool(tx.scalar(text("SELECT count(*) FROM pg_prepared_statements"))) is expected
        engine.dispose()


_ONE = text("SELECT 1 AS one")
