"""Addresses of the database: which forms payready accepts, and the sentence that says what to write instead.

It imports no driver. libpq, PostgreSQL's client library, parses the accepted addresses again when it connects.
"""

import re
from collections.abc import Mapping
from typing import Annotated
from urllib.parse import unquote

from pydantic import AfterValidator

_POSTGRESQL_SCHEMES = ("postgresql", "postgres")
_MAX_PORT = 65_535
_HOST_AND_PORT = re.compile(r"(?:\[[0-9A-Za-z:.%]+\]|[^\[\]:@]*)(?::(?P<port>\d{0,5}))?")
_HOST_OPTION = re.compile(r"[/@].*|[^:]*|[0-9A-Fa-f.]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*")
"""One host of the option `host`: a folder of sockets, an abstract socket, a name, or an IPv6 address."""
_POOLER_OPTIONS = frozenset(
    ("prepare_threshold", "prepareThreshold", "statement_cache_size", "prepared_statement_cache_size", "pgbouncer")
)
"""Options of drivers by which other applications switch prepared statements off."""
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "ssl": ("true",),
    "sslnegotiation": ("postgres", "direct"),
    "sslcertmode": ("disable", "allow", "require"),
    "channel_binding": ("disable", "prefer", "require"),
    "gssencmode": ("disable", "prefer", "require"),
    "target_session_attrs": ("any", "read-write", "primary"),  # payready writes, so no other session is of use
    "load_balance_hosts": ("disable", "random"),
    "client_encoding": ("utf8", "UTF8", "utf-8", "UTF-8"),
}
_NUMBERS = frozenset(
    (
        "connect_timeout",
        "keepalives",
        "keepalives_idle",
        "keepalives_interval",
        "keepalives_count",
        "tcp_user_timeout",
        "sslsni",
    )
)
_TEXTS = frozenset(
    (
        "host",
        "hostaddr",
        "port",
        "dbname",
        "user",
        "password",
        "passfile",
        "service",
        "options",
        "application_name",
        "fallback_application_name",
        "sslcert",
        "sslkey",
        "sslpassword",
        "sslrootcert",
        "sslcrl",
        "sslcrldir",
        "ssl_min_protocol_version",
        "ssl_max_protocol_version",
        "requirepeer",
        "require_auth",
        "krbsrvname",
        "gsslib",
        "gssdelegation",
    )
)
_PORTS = "must have for its option port one port, or one for each host, separated by commas"
LIBPQ_OPTIONS = _TEXTS | _NUMBERS | _CHOICES.keys()
"""Options of libpq that an address may have after its question mark. A test compares them with libpq's own list."""


def normalise_database_url(url: str) -> str:
    """Return the address with the scheme `postgresql` or `sqlite`, as libpq or SQLAlchemy takes it.

    Raises:
        ValueError: the address has another form. The message says what to write, and repeats nothing of the address:
            it may have a password anywhere.
    """
    scheme, _, rest = url.partition("://")
    database, _, driver = scheme.partition("+")
    if driver and database in (*_POSTGRESQL_SCHEMES, "sqlite"):
        beginning = "sqlite:///" if database == "sqlite" else "postgresql://"
        raise ValueError(f"must begin with {beginning}, without the name of a driver: payready has its own")
    if scheme == "sqlite":
        return _checked_sqlite(url, rest)
    if scheme in _POSTGRESQL_SCHEMES and "://" in url:
        return f"postgresql://{_checked_postgresql(rest)}"
    raise ValueError("must begin with postgresql:// or sqlite:///, such as postgresql://user:password@host:5432/name")


def require_options_that_transactions_can_set(url: str) -> None:
    """Raise `ValueError` if the `options` of a normalised address are more than settings."""
    for option in url.partition("?")[2].split("&"):
        name, _, value = option.partition("=")
        if name == "options":
            settings_in_options(unquote(value))


def settings_in_options(options: str) -> dict[str, str]:
    """Return the settings of `-c name=value -cname=value --name=value`. A backslash escapes a space, as in libpq.

    Raises:
        ValueError: there is something else in it.
    """
    words = [re.sub(r"\\(.)", r"\1", word) for word in re.findall(r"(?:\\.|[^\s\\])+", options)]
    found, rest = {}, iter(words)
    for word in rest:
        assignment = re.fullmatch(
            r"(?:-c|--)([\w.-]+)=(.*)", f"-c{next(rest, '')}" if word == "-c" else word, re.DOTALL
        )
        if assignment is None:
            raise ValueError(
                "PAYREADY_DATABASE_URL: with PAYREADY_DATABASE_POOLER=transaction, `options` may only have settings "
                "such as -csearch_path=name"
            )
        found[assignment[1].replace("-", "_")] = assignment[2]
    return found


DatabaseUrl = Annotated[str, AfterValidator(normalise_database_url)]


def _checked_sqlite(url: str, rest: str) -> str:
    file = rest.removeprefix("/")
    if not rest.startswith("/") or not file or file == ":memory:" or "?" in file:
        raise ValueError(
            "must be sqlite:///file or sqlite:////folder/file, a file that all roles share, without options"
        )
    return url


def _checked_postgresql(rest: str) -> str:
    before, _, query = rest.partition("?")
    authority, _, name = before.partition("/")
    credentials, _, hosts = authority.rpartition("@")
    is_plain = re.fullmatch("[!-~]*", rest) and not re.search("#|%(?![0-9A-Fa-f]{2})|%00", rest)
    if not is_plain or "@" in credentials or "/" in name or not all(map(_is_host_and_port, hosts.split(","))):
        raise ValueError(
            "must be postgresql://user:password@host:port/name, or several host:port separated by commas, with other "
            "characters of user, password and name percent-encoded, such as %40 for @"
        )
    return f"{before}?{_checked_options(query, hosts)}" if query else before


def _is_host_and_port(text: str) -> bool:
    found = _HOST_AND_PORT.fullmatch(text)
    return found is not None and (not found["port"] or 0 < int(found["port"]) <= _MAX_PORT)


def _checked_options(query: str, hosts: str) -> str:
    options: dict[str, str] = {}
    for position, option in enumerate(query.split("&"), start=1):
        name, equals, value = option.partition("=")
        if name in _POOLER_OPTIONS:
            raise ValueError(
                f"must not have {name}, an option of another client; set PAYREADY_DATABASE_POOLER=transaction for a "
                "pooler such as PgBouncer"
            )
        if not equals or name not in LIBPQ_OPTIONS:
            raise ValueError(
                f"has an option that payready cannot pass on to libpq, PostgreSQL's client library: number {position} "
                "after the question mark; write options of libpq as name=value, separated by &"
            )
        if name in options:
            raise ValueError(f"must have {name} once; write several hosts as postgresql://host1:port1,host2:port2/name")
        _check_option(name, unquote(value))
        options[name] = value.replace("=", "%3D")  # libpq accepts no second one: `options=-csearch_path=pay`
    ports = options.get("port", "").count(",") + 1
    if ports not in (1, unquote(options.get("hostaddr") or options.get("host") or hosts).count(",") + 1):
        raise ValueError(_PORTS)
    return "&".join(f"{name}={value}" for name, value in options.items())


def _check_option(name: str, value: str) -> None:
    if name in _CHOICES and value not in _CHOICES[name]:
        raise ValueError(f"must have for its option {name} one of: {', '.join(_CHOICES[name])}")
    if name in _NUMBERS and not re.fullmatch(r"\d{1,9}", value):
        raise ValueError(f"must have a whole number for its option {name}")
    if name == "port" and not re.fullmatch(r"\d{1,5}(,\d{1,5})*", value):
        raise ValueError(_PORTS)
    if name == "host" and not all(map(_HOST_OPTION.fullmatch, value.split(","))):
        raise ValueError("must have no port in its option host; write postgresql://host1:port1,host2:port2/name")
