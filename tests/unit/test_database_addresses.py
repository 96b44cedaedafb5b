"""Addresses of the database: each accepted one can be used by the driver, each other one gets one sentence."""

import pytest
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict

from config.database_addresses import LIBPQ_OPTIONS
from config.settings import ConfigurationError, load_rejecting_unknown

ACCEPTED = {
    "postgresql://u:p%40ss@h:5432/db": {"user": "u", "password": "p@ss", "host": "h", "port": "5432", "dbname": "db"},
    "postgres://u:p@h/db": {"user": "u", "password": "p", "host": "h", "dbname": "db"},
    "postgresql://h1:1,h2:2,h3/db?target_session_attrs=read-write": {
        "host": "h1,h2,h3",
        "port": "1,2,",
        "dbname": "db",
        "target_session_attrs": "read-write",
    },
    "postgresql://u@[::1]:5432,[fe80::1%25eth0]/db": {
        "user": "u",
        "host": "::1,fe80::1%eth0",
        "port": "5432,",
        "dbname": "db",
    },
    "postgresql:///db?host=/run/postgresql": {"host": "/run/postgresql", "dbname": "db"},
    "postgresql:///db?host=h1,h2,::1&port=1,2,3": {"host": "h1,h2,::1", "port": "1,2,3", "dbname": "db"},
    "postgresql://%2Frun%2Fpostgresql/db": {"host": "/run/postgresql", "dbname": "db"},
    "postgresql://u@/db?host=@socket": {"user": "u", "host": "@socket", "dbname": "db"},
    "postgresql://h": {"host": "h"},
    "postgresql://h/db?": {"host": "h", "dbname": "db"},
    "postgresql://h/db?sslmode=verify-full&sslrootcert=/a%20b.pem&connect_timeout=3": {
        "host": "h",
        "dbname": "db",
        "sslmode": "verify-full",
        "sslrootcert": "/a b.pem",
        "connect_timeout": "3",
    },
    "postgresql://h/db?options=-csearch_path=pay%20-cwork_mem=1MB": {
        "host": "h",
        "dbname": "db",
        "options": "-csearch_path=pay -cwork_mem=1MB",
    },
}


@pytest.mark.parametrize(("url", "expected"), ACCEPTED.items(), ids=ACCEPTED)
def test_accepted_address_has_its_meaning_for_libpq(url: str, expected: dict[str, str]) -> None:
    """Also where libpq itself would refuse the spelling: `postgres`, and a second `=` in an option."""
    accepted = load_rejecting_unknown({"PAYREADY_DATABASE_URL": url}).database_url
    assert accepted.startswith("postgresql://")
    assert conninfo_to_dict(accepted) == expected


@pytest.mark.parametrize("url", ["sqlite:///payready.db", "sqlite:////var/lib/pay ready/é.db"])
def test_accepted_sqlite_address_is_unchanged(url: str) -> None:
    assert load_rejecting_unknown({"PAYREADY_DATABASE_URL": url}).database_url == url


BEGIN = "must begin with postgresql:// or sqlite:///"
DRIVER = "without the name of a driver"
FORM = "must be postgresql://user:password@host:port/name"
FILE = "must be sqlite:///file"
POOLER = "set PAYREADY_DATABASE_POOLER=transaction"
NOT_PASSED_ON = "has an option that payready cannot pass on to libpq"
REFUSED = {
    "mysql://hunter2@h/db": BEGIN,
    "hunter2": BEGIN,
    "postgresql:hunter2": BEGIN,
    "postgresql": BEGIN,
    "host=h password=hunter2": BEGIN,
    "POSTGRESQL://hunter2@h/db": BEGIN,
    "oracle+cx_oracle://u:hunter2@h": BEGIN,
    "postgresql+psycopg://u:hunter2@h/db": f"must begin with postgresql://, {DRIVER}",
    "postgresql+asyncpg://u:hunter2@h/db": f"must begin with postgresql://, {DRIVER}",
    "postgres+psycopg2://u:hunter2@h/db": f"must begin with postgresql://, {DRIVER}",
    "sqlite+aiosqlite:///hunter2": f"must begin with sqlite:///, {DRIVER}",
    "postgresql://u:hunter2@x@h/db": FORM,
    "postgresql://u:hunter2/x@h/db": FORM,
    "postgresql://u:hunter2#x@h/db": FORM,
    "postgresql://u:hunter2?x@h/db": FORM,
    "postgresql://u:hunter2%zz@h/db": FORM,
    "postgresql://u:hunter2%00@h/db": FORM,
    "postgresql://u:hunter2é@h/db": FORM,
    "postgresql://u:hunter2 x@h/db": FORM,
    "postgresql://u:hunter2@h:port/db": FORM,
    "postgresql://u:hunter2@h:0/db": FORM,
    "postgresql://u:hunter2@h:65536/db": FORM,
    "postgresql://u:hunter2@h:1:2/db": FORM,
    "postgresql://u:hunter2@::1/db": FORM,
    "postgresql://h/db/hunter2": FORM,
    "sqlite://": FILE,
    "sqlite:///": FILE,
    "sqlite://hunter2/x": FILE,
    "sqlite:///:memory:": FILE,
    "sqlite:///hunter2.db?timeout=5": FILE,
    "postgresql://h/db?prepare_threshold=0": f"must not have prepare_threshold, an option of another client; {POOLER}",
    "postgresql://h/db?sslmode=require&pgbouncer=true": "must not have pgbouncer,",
    "postgresql://h/db?sslmode=require&hunter2=1": f"{NOT_PASSED_ON}, PostgreSQL's client library: number 2 ",
    "postgresql://h/db?autocommit=hunter2": NOT_PASSED_ON,
    "postgresql://h/db?replication=database": NOT_PASSED_ON,
    "postgresql://h/db?hunter2": NOT_PASSED_ON,
    "postgresql://h/db?sslmode=require&": NOT_PASSED_ON,
    "postgresql://h/db?sslmode=hunter2": "must have for its option sslmode one of: disable, allow,",
    "postgresql://h1,h2/db?target_session_attrs=standby": "must have for its option target_session_attrs one of: any",
    "postgresql://h/db?client_encoding=latin1": "must have for its option client_encoding one of: utf8",
    "postgresql://h/db?connect_timeout=hunter2": "must have a whole number for its option connect_timeout",
    "postgresql://h/db?port=hunter2": "must have for its option port one port",
    "postgresql://h/db?port=1,2": "must have for its option port one port, or one for each host",
    "postgresql://h1,h2/db?port=1,2,3": "must have for its option port one port, or one for each host",
    "postgresql://h/db?host=h1,h2&port=1,2,3": "must have for its option port one port, or one for each host",
    "postgresql:///db?host=h1:1": "must have no port in its option host; write postgresql://host1:port1,",
    "postgresql:///db?host=h1&host=h2": "must have host once; write several hosts as postgresql://host1:port1,",
}


@pytest.mark.parametrize(("url", "sentence"), REFUSED.items(), ids=REFUSED)
def test_refused_address_gets_one_sentence_without_its_parts(url: str, sentence: str) -> None:
    """The password may be in any part of a wrong address."""
    with pytest.raises(ConfigurationError) as error_info:
        load_rejecting_unknown({"PAYREADY_DATABASE_URL": url})
    message = str(error_info.value)
    assert message.startswith(f"PAYREADY_DATABASE_URL: {sentence}")
    assert "hunter2" not in message
    assert "\n" not in message


@pytest.mark.parametrize("options", ["hunter2", "-c%20hunter2", "-c+search_path=pay", "-csearch_path=pay%20hunter2"])
def test_options_that_transactions_cannot_set_stop_the_start(options: str) -> None:
    """Behind a pooler. Otherwise the roles start, and no job can be stored."""
    url = f"postgresql://h/db?options={options}"
    load_rejecting_unknown({"PAYREADY_DATABASE_URL": url})
    with pytest.raises(ConfigurationError, match="`options` may only have settings") as error_info:
        load_rejecting_unknown({"PAYREADY_DATABASE_URL": url, "PAYREADY_DATABASE_POOLER": "transaction"})
    assert "hunter2" not in str(error_info.value)


def test_options_are_known_to_libpq() -> None:
    """`ssl=true` is its alias of `sslmode=require` in an address."""
    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    assert known > LIBPQ_OPTIONS - {"ssl"}
    assert conninfo_to_dict("postgresql://h/db?ssl=true")["sslmode"] == "require"
