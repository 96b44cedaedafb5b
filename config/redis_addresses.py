"""Addresses of Redis: one parser for the correlation store, the broker and the result backend.

| address | server |
|---|---|
| `redis://[user:password@]host[:port][/database]` | one server |
| `rediss://...` | the same with TLS; `ssl_*` options follow after `?` |
| `redis+socket:///path[?virtual_host=database]` | a Unix socket, as Celery spells it; also `unix:///path?db=database` |
| `sentinel://[user:password@]host[:port],host[:port]/[database]?master=name` | the primary that the Sentinels name |
| `sentinels://...` | the same, with TLS to the Sentinels and to the servers |
| `redis+cluster://[user:password@]host[:port],host[:port]`, `rediss+cluster://...` | a cluster, without or with TLS |

An error never repeats a part of an address: a character that is not percent-encoded may cut a password anywhere.
"""

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from config.addresses import (
    AMQP_SCHEMES,
    require_percent_encoded_credentials,
    require_usable_amqp_addresses,
)

_HOST_AND_PORT = re.compile(r"(?:\[(?P<ipv6>[0-9a-fA-F:.]+)\]|(?P<name>[\w.-]+))(?::(?P<port>\d{1,5}))?", re.ASCII)
_DEFAULT_PORTS = {"server": 6379, "sentinel": 26379, "cluster": 6379}
_VERIFICATIONS = {
    "required": ssl.CERT_REQUIRED,
    "cert_required": ssl.CERT_REQUIRED,
    "none": ssl.CERT_NONE,
    "cert_none": ssl.CERT_NONE,
}
_BOOLEANS = {"true": True, "false": False}
_TLS_OPTIONS = frozenset(("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname", "ssl_cert_reqs"))
_SENTINEL_OPTIONS = frozenset(("master", "sentinel_username", "sentinel_password"))

Kind = Literal["server", "socket", "sentinel", "cluster"]


@dataclass(frozen=True, kw_only=True)
class _Scheme:
    """What a scheme means."""

    kind: Kind
    is_tls: bool = False

    @property
    def options(self) -> frozenset[str]:
        """Names of the options that may follow after `?`."""
        own = {"socket": frozenset(("virtual_host", "db")), "sentinel": _SENTINEL_OPTIONS}.get(self.kind, frozenset())
        return own | _TLS_OPTIONS if self.is_tls else own


_SCHEMES = {
    "redis": _Scheme(kind="server"),
    "rediss": _Scheme(kind="server", is_tls=True),
    "redis+socket": _Scheme(kind="socket"),
    "unix": _Scheme(kind="socket"),
    "sentinel": _Scheme(kind="sentinel"),
    "sentinels": _Scheme(kind="sentinel", is_tls=True),
    "redis+cluster": _Scheme(kind="cluster"),
    "rediss+cluster": _Scheme(kind="cluster", is_tls=True),
}


class AddressError(ValueError):
    """An address that payready cannot use. The message completes the sentence `PAYREADY_..._URL ...`."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """Name or IP address, and port, of a server."""

    name: str
    port: int

    def __str__(self) -> str:
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """User and password of a server."""

    username: str | None = None
    password: str | None = None

    @property
    def as_options(self) -> dict[str, str]:
        """Options of redis-py."""
        named = {"username": self.username, "password": self.password}
        return {name: value for name, value in named.items() if value}


@dataclass(frozen=True, kw_only=True)
class RedisAddress:
    """A parsed address."""

    kind: Kind
    hosts: tuple[Host, ...] = ()
    """The server, or the known Sentinels, or the known nodes of a cluster. Empty for a socket."""
    path: str | None = None
    """Path of the socket."""
    database: int = 0
    credentials: Credentials
    """Of the servers that store the data."""
    master_name: str | None = None
    """Name under which the Sentinels know the servers."""
    sentinel_credentials: Credentials
    tls: Mapping[str, Any] | None = None
    """redis-py's `ssl_*` options, or None without TLS."""

    @property
    def host_ports(self) -> list[tuple[str, int]]:
        """Hosts as redis-py takes them."""
        return [(host.name, host.port) for host in self.hosts]

    @property
    def tls_options(self) -> dict[str, Any]:
        """Options of redis-py's clients for TLS."""
        return {} if self.tls is None else {"ssl": True, **self.tls}

    @property
    def celery_url(self) -> str:
        """Address for kombu and for Celery's result backends. It has no options: they are in Celery's settings."""
        userinfo = ""
        if self.credentials.as_options:
            named = self.credentials
            userinfo = f"{quote(named.username or '', safe='')}:{quote(named.password or '', safe='')}@"
        if self.path is not None:
            return f"redis+socket://{userinfo}{quote(self.path)}?virtual_host={self.database}"
        scheme = "sentinel" if self.kind == "sentinel" else "rediss" if self.tls else "redis"
        return ";".join(f"{scheme}://{userinfo}{host}/{self.database}" for host in self.hosts)

    def sentinel_options(self, *, timeout_s: float) -> dict[str, Any]:
        """Options of redis-py for the connections to the Sentinels.

        `retry` is None, so that a Sentinel that does not respond is skipped at once: by default redis-py tries each
        eleven times.
        """
        timeouts = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
        return {**timeouts, "retry": None, **self.sentinel_credentials.as_options, **self.tls_options}


def is_redis_address(url: str) -> bool:
    """Return whether the address has a scheme of Redis."""
    return _scheme_name(url) in _SCHEMES


def parse_redis_address(url: str) -> RedisAddress:
    """Parse an address of Redis.

    Raises:
        AddressError: it is none, or it is incomplete.
    """
    scheme = _SCHEMES.get(_scheme_name(url) or "")
    if scheme is None:
        raise AddressError(f"must begin with {_schemes_text(_SCHEMES)}")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise AddressError("is no valid URL; percent-encode special characters in the password") from None
    options = _parse_options(scheme, parts)
    if scheme.kind == "sentinel" and not options.get("master"):
        raise AddressError("must name the master that the Sentinels watch, as in sentinel://host1,host2/0?master=name")
    userinfo, _, hosts = parts.netloc.rpartition("@")
    username, _, password = userinfo.partition(":")
    return RedisAddress(
        kind=scheme.kind,
        hosts=() if scheme.kind == "socket" else _parse_hosts(hosts, _DEFAULT_PORTS[scheme.kind], scheme.kind),
        path=_parse_socket_path(hosts, parts.path) if scheme.kind == "socket" else None,
        database=_parse_database(scheme.kind, parts.path, options),
        credentials=Credentials(username=unquote(username) or None, password=unquote(password) or None),
        master_name=options.get("master"),
        sentinel_credentials=Credentials(
            username=options.get("sentinel_username"), password=options.get("sentinel_password")
        ),
        tls=_parse_tls(options) if scheme.is_tls else None,
    )


def require_usable_addresses(*, prefix: str, redis_url: str, broker_url: str | None, results_url: str | None) -> None:
    """Check the addresses of the settings `REDIS_URL`, `BROKER_URL` and `RESULT_BACKEND_URL`.

    Raises:
        ValueError: payready cannot use one of them; the message names the setting and says what to write.
    """
    _check(f"{prefix}REDIS_URL", redis_url)
    is_cluster = parse_redis_address(redis_url).kind == "cluster"
    for name, url, use in (("BROKER_URL", broker_url, "broker"), ("RESULT_BACKEND_URL", results_url, "result backend")):
        if url is None and is_cluster:
            raise ValueError(
                f"{prefix}{name} must be set: {prefix}REDIS_URL names a Redis Cluster, which Celery cannot use as {use}"
            )
        if url is not None:
            _check_use(f"{prefix}{name}", url, use)


def _check_use(name: str, url: str, use: str) -> None:
    scheme = _scheme_name(url)
    if use == "broker" and scheme in AMQP_SCHEMES:
        require_usable_amqp_addresses(name, url)
    elif use == "result backend" and scheme is not None and scheme not in _SCHEMES:  # another backend of Celery
        require_percent_encoded_credentials(name, url)
    else:
        _check(name, url, use=use)


def _check(name: str, url: str, use: str | None = None) -> None:
    """Raise ValueError if the address is none of Redis, or if Celery cannot `use` it as broker or result backend."""
    known = [*(n for n, scheme in _SCHEMES.items() if scheme.kind != "cluster"), *AMQP_SCHEMES]
    if use == "broker" and _scheme_name(url) not in _SCHEMES:
        raise ValueError(f"{name} must begin with {_schemes_text(known)}")
    try:
        address = parse_redis_address(url)
    except AddressError as error:
        raise ValueError(f"{name} {error}") from None
    if use and address.kind == "cluster":
        raise ValueError(f"{name} must name a server or Sentinels: Celery cannot use a Redis Cluster as {use}")
    if not _has_readable_files(address.tls or {}):
        raise ValueError(f"{name} must name readable files in PEM format as ssl_ca_certs, ssl_certfile and ssl_keyfile")


def _has_readable_files(tls: Mapping[str, Any]) -> bool:
    """Return whether TLS can be set up. Without this check a role would start, and never connect."""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # a default context reads all certificates of the host: 25 ms
        if "ssl_ca_certs" in tls:
            context.load_verify_locations(tls["ssl_ca_certs"])
        if "ssl_certfile" in tls:
            context.load_cert_chain(tls["ssl_certfile"], tls["ssl_keyfile"])
    except OSError:  # `SSLError` is one
        return False
    return True


def _scheme_name(url: str) -> str | None:
    found = re.match(r"([a-z][a-z0-9+]*)://", url)
    return found[1] if found else None


def _schemes_text(names: Any) -> str:
    *most, last = (f"{name}://" for name in names)
    return f"{', '.join(most)} or {last}"


def _parse_options(scheme: _Scheme, parts: SplitResult) -> dict[str, str]:
    if parts.fragment:
        raise AddressError("has a # that is not percent-encoded; write %23")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if set(options) - scheme.options:
        allowed = ", ".join(sorted(scheme.options)) or "none"
        raise AddressError(f"has an unknown option after its ?; options of {parts.scheme}:// are: {allowed}")
    return options


def _parse_hosts(text: str, default_port: int, kind: Kind) -> tuple[Host, ...]:
    hosts = tuple(_parse_host(part, default_port) for part in text.split(","))
    if kind == "server" and len(hosts) > 1:
        raise AddressError("has several hosts; write sentinel:// or redis+cluster:// for several servers")
    return hosts


def _parse_host(text: str, default_port: int) -> Host:
    found = _HOST_AND_PORT.fullmatch(text)
    if not found or int(found["port"] or 1) not in range(1, 65536):
        raise AddressError("must have a host, and a port from 1 to 65535; percent-encode special characters")
    return Host(name=found["ipv6"] or found["name"], port=int(found["port"] or default_port))


def _parse_socket_path(host: str, path: str) -> str:
    if host or len(path) < len("/x"):
        raise AddressError("must have the absolute path of the socket, as in redis+socket:///run/redis.sock")
    return unquote(path)


def _parse_database(kind: Kind, path: str, options: Mapping[str, str]) -> int:
    text = options.get("virtual_host", options.get("db", "")) if kind == "socket" else path.strip("/")
    if not re.fullmatch(r"\d{0,5}", text):
        raise AddressError("must have a number as database, or none")
    database = int(text or 0)
    if kind == "cluster" and database:
        raise AddressError("must have no database: a Redis Cluster has only database 0")
    return database


def _parse_tls(options: Mapping[str, str]) -> dict[str, Any]:
    """Return redis-py's options. Without `ssl_cert_reqs` a valid certificate with the name of the host is required."""
    verification = _VERIFICATIONS.get(options.get("ssl_cert_reqs", "required").lower())
    if verification is None:
        raise AddressError("must have required or none as ssl_cert_reqs")
    checks_hostname = _BOOLEANS.get(options.get("ssl_check_hostname", "true").lower())
    if checks_hostname is None:
        raise AddressError("must have true or false as ssl_check_hostname")
    files = {name: options[name] for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile") if options.get(name)}
    if ("ssl_certfile" in files) != ("ssl_keyfile" in files):
        raise AddressError("must have both ssl_certfile and ssl_keyfile, or neither")
    is_verified = verification is not ssl.CERT_NONE
    return {"ssl_cert_reqs": verification, "ssl_check_hostname": checks_hostname and is_verified, **files}
