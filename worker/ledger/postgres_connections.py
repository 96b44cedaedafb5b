"""How payready connects to PostgreSQL: the arguments of a connection, and the settings of its transactions.

The settings travel with the start of the session. A pooler such as PgBouncer refuses them there, and gives each
transaction another session. With `pooler="transaction"` each transaction therefore sets them for itself.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import psycopg
from psycopg.conninfo import conninfo_to_dict

from config.database_addresses import settings_in_options
from config.settings import ConfigurationError

Pooler = Literal["none", "transaction"]
PLAN_TYPES = ("enable_seqscan", "enable_hashjoin", "enable_mergejoin", "jit")
"""Plan types that are off in transactions, whose statements find rows by key. Otherwise PostgreSQL scans a small table
sequentially, and keeps that plan while the table grows, until it analyzes it."""
ENABLE_ALL_PLANS: Mapping[str, str] = dict.fromkeys(PLAN_TYPES, "on")
"""Settings for reports and migrations, which read whole tables."""
SETTINGS: Mapping[str, str] = {
    "timezone": "UTC",
    "lock_timeout": "5s",
    "statement_timeout": "15s",
    "idle_in_transaction_session_timeout": "30s",
    **dict.fromkeys(PLAN_TYPES, "off"),
}
MIGRATION_SETTINGS: Mapping[str, str] = {**SETTINGS, "statement_timeout": "0", **ENABLE_ALL_PLANS}
"""A migration may scan or index a large table. The limit of waits for locks stays: a waiting migration blocks
workers."""
_DEFAULTS: Mapping[str, Any] = {
    "connect_timeout": 5,
    "application_name": "payready",
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
"""With `SETTINGS`, every wait is limited: for the lock of a frozen host, for a statement, and for a lost host."""


@dataclass(frozen=True, kw_only=True)
class PostgresConnections:
    """What all connections of an engine have in common."""

    arguments: Mapping[str, Any]
    """Arguments of `psycopg.connect`."""
    transaction_settings: str
    """Statement with which each transaction begins. Empty if the session has the settings."""


def connections_to(url: str, settings: Mapping[str, str], *, pooler: Pooler) -> PostgresConnections:
    """Return how to connect to `postgresql://...`, with several hosts, Unix sockets and options as libpq allows.

    An option of the address replaces ours, and its `options` are added to ours. One of several hosts must accept
    writes.

    Raises:
        ConfigurationError: libpq cannot read the address.
        ValueError: transactions cannot set its `options`. `Settings` refuses such an address.
    """
    given = _parse(url)
    arguments = {**_several_hosts(given), **_DEFAULTS, **given}
    options = str(arguments.pop("options", ""))
    if pooler == "transaction":
        arguments["prepare_threshold"] = None  # a prepared statement stays in a session that others use next
        statement = statement_that_sets({**settings, **settings_in_options(options)})
        return PostgresConnections(arguments=arguments, transaction_settings=statement)
    ours = " ".join(f"-c {name}={value}" for name, value in settings.items())
    arguments["options"] = f"{ours} {options}".rstrip()
    return PostgresConnections(arguments=arguments, transaction_settings="")


def _parse(url: str) -> dict[str, Any]:
    try:
        return dict(conninfo_to_dict(url))
    except psycopg.ProgrammingError:
        # Without libpq's text, which may quote the password.
        raise ConfigurationError(
            "PAYREADY_DATABASE_URL: libpq cannot read the address; "
            "write postgresql://user:password@host:5432/name, with special characters as %-codes"
        ) from None


def _several_hosts(given: Mapping[str, Any]) -> dict[str, str]:
    hosts = str(given.get("host") or given.get("hostaddr") or "")
    return {"target_session_attrs": "read-write"} if "," in hosts else {}


def statement_that_sets(settings: Mapping[str, str]) -> str:
    """Return a statement that changes settings until the end of the transaction."""
    return "SELECT " + ", ".join(
        f"set_config({_quoted(name)}, {_quoted(value)}, true)" for name, value in settings.items()
    )


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


class UnconfiguredPooler(Exception):
    """A connection pooler is in front of PostgreSQL: set PAYREADY_DATABASE_POOLER=transaction."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)


def raise_if_pooler(error: BaseException | None) -> None:
    """Raise `UnconfiguredPooler` if a pooler refused the settings of the session, as PgBouncer and RDS Proxy do."""
    if re.search("unsupported startup parameter|support command-line options", str(error)):
        raise UnconfiguredPooler from error


def close_and_raise_if_pooled(connection: "psycopg.Connection[Any]") -> None:
    """Close a connection to a pooler, and raise `UnconfiguredPooler`.

    A pooler that ignores the settings of the session would execute prepared statements of other clients with our
    arguments. It states a process id of its own.
    """
    row = connection.execute("SELECT pg_backend_pid()", prepare=False).fetchone()
    if row != (connection.info.backend_pid,):
        connection.close()
        raise UnconfiguredPooler
