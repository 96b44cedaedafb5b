"""Addresses of Redis: what each spelling means to payready and to Celery, and one sentence for each error."""

import ssl
from typing import Any

import pytest
from celery import Celery
from redis import Redis, SSLConnection, UnixDomainSocketConnection
from redis.sentinel import SentinelConnectionPool

from config import redis_addresses
from config.addresses import without_credentials_and_query
from config.celery_config import celery_settings
from config.redis_addresses import AddressError, parse_redis_address
from config.settings import ConfigurationError, load_rejecting_unknown
from worker.correlation.redis_client import open_redis

SENTINELS = "sentinel://h1:5001,h2,[::1]:5003/2?master=pay"
CREDENTIALS = (
    "sentinels://u%3A:p%40%2C@h1,h2/0?master=pay&sentinel_username=s&sentinel_password=t%26&ssl_ca_certs=/ca.pem"
)


@pytest.fixture(autouse=True)
def _no_connection_and_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make kombu's channels without a server, to which they send a PING, and without the files for TLS."""
    monkeypatch.setattr(Redis, "ping", lambda _: True)
    monkeypatch.setattr(redis_addresses, "_has_readable_files", lambda _: True)


def _celery(address: str) -> Celery:
    app = Celery("addresses", set_as_current=False)
    app.conf.update(celery_settings(load_rejecting_unknown({"PAYREADY_REDIS_URL": address})))
    return app


def _pools(address: str) -> dict[str, Any]:
    """Return the connection pools of payready, of the broker and of the result backend."""
    app = _celery(address)
    with app.connection_for_write() as connection:
        channel = connection.transport.Channel(connection.transport)
        return {
            "payready": open_redis(address).connection_pool,
            "broker": channel._get_pool(),
            "results": app.backend.client.connection_pool,
        }


@pytest.mark.parametrize("use", ["payready", "broker", "results"])
@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("redis://r", {"host": "r", "port": 6379, "db": 0}),
        ("redis://:p%40ss@r:1/3", {"host": "r", "port": 1, "db": 3, "password": "p@ss"}),
        ("redis://user:p@[::1]:7/", {"host": "::1", "port": 7, "username": "user", "password": "p"}),
        ("redis+socket:///run/r.sock", {"path": "/run/r.sock", "db": 0}),
        ("redis+socket:///run/r.sock?virtual_host=2", {"path": "/run/r.sock", "db": 2}),
        ("unix://u:p@/run/r.sock?db=2", {"path": "/run/r.sock", "db": 2, "username": "u", "password": "p"}),
        ("rediss://r", {"host": "r", "ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}),
        ("rediss://r?ssl_cert_reqs=none", {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_check_hostname": False}),
        ("rediss://r?ssl_cert_reqs=CERT_REQUIRED", {"ssl_cert_reqs": ssl.CERT_REQUIRED}),
        (
            "rediss://r/1?ssl_ca_certs=/ca.pem&ssl_certfile=/c.pem&ssl_keyfile=/k.pem&ssl_check_hostname=false",
            {
                "db": 1,
                "ssl_ca_certs": "/ca.pem",
                "ssl_certfile": "/c.pem",
                "ssl_keyfile": "/k.pem",
                "ssl_check_hostname": False,
            },
        ),
        (SENTINELS, {"db": 2}),
        (CREDENTIALS, {"db": 0, "username": "u:", "password": "p@,", "ssl_ca_certs": "/ca.pem"}),
    ],
)
def test_address_means_the_same_to_payready_and_celery(use: str, address: str, expected: dict[str, Any]) -> None:
    """The broker is kombu's client, the results are in Celery's."""
    pool = _pools(address)[use]
    assert expected.items() <= pool.connection_kwargs.items()
    assert issubclass(pool.connection_class, SSLConnection) == ("ssl_cert_reqs" in str(expected) or "ssl_ca" in address)
    assert issubclass(pool.connection_class, UnixDomainSocketConnection) == ("sock" in address)


@pytest.mark.parametrize("use", ["payready", "broker", "results"])
def test_all_clients_ask_all_sentinels(use: str) -> None:
    """A Sentinel that does not respond is skipped at once, instead of eleven tries."""
    pool = _pools(SENTINELS)[use]
    assert isinstance(pool, SentinelConnectionPool)
    assert pool.service_name == "pay"
    clients: list[Redis] = pool.sentinel_manager.sentinels
    kwargs = [client.connection_pool.connection_kwargs for client in clients]
    assert [(each["host"], each["port"]) for each in kwargs] == [("h1", 5001), ("h2", 26379), ("::1", 5003)]
    assert [each["socket_connect_timeout"] for each in kwargs] == [5, 5, 5]
    assert [client.get_retry() for client in clients] == [None] * 3


@pytest.mark.parametrize("use", ["payready", "broker", "results"])
def test_sentinels_have_credentials_of_their_own(use: str) -> None:
    """With `sentinels://` they are asked with TLS too."""
    sentinel: Redis = _pools(CREDENTIALS)[use].sentinel_manager.sentinels[1]
    kwargs = sentinel.connection_pool.connection_kwargs
    assert {"host": "h2", "username": "s", "password": "t&", "ssl_ca_certs": "/ca.pem"}.items() <= kwargs.items()
    assert issubclass(sentinel.connection_pool.connection_class, SSLConnection)


def test_celery_shows_no_password_of_a_sentinel() -> None:
    """`inspect conf` and Flower show the configuration of a worker."""
    shown = _celery("sentinel://u:hunter2@h1,h2/0?master=m&sentinel_password=hunter2").conf.humanize(with_defaults=True)
    assert "hunter2" not in shown
    assert "h1" in shown


def test_cluster_is_an_address_of_the_correlation_store() -> None:
    address = parse_redis_address("rediss+cluster://u:p@h1:1,h2:2?ssl_ca_certs=/ca.pem")
    assert (address.kind, address.host_ports) == ("cluster", [("h1", 1), ("h2", 2)])
    assert address.tls_options["ssl_ca_certs"] == "/ca.pem"
    open_redis("redis+cluster://127.0.0.1:1").close()  # it has not connected


SCHEMES = "redis://, rediss://, redis+socket://, unix://, sentinel:// or sentinels://"
INVALID_ADDRESSES = [
    ("nonsense", "must begin with redis://, rediss://"),
    ("AMQP://hunter2", "must begin with redis://, rediss://"),
    ("redis:/hunter2", "must begin with redis://, rediss://"),
    ("redis://", "must have a host, and a port from 1 to 65535"),
    ("redis://hunter2:port", "must have a host, and a port from 1 to 65535"),
    ("redis://h:0", "must have a host, and a port from 1 to 65535"),
    ("redis://h%20/0", "must have a host, and a port from 1 to 65535"),
    ("sentinel://h1,/0?master=m", "must have a host, and a port from 1 to 65535"),
    ("redis://h:65536", "must have a host, and a port from 1 to 65535"),
    ("redis://[hunter2", "is no valid URL; percent-encode special characters in the password"),
    ("redis://:hun#ter2@h", "has a # that is not percent-encoded; write %23"),
    ("redis://:hun/ter2@h", "must have a host, and a port from 1 to 65535"),
    ("redis://h1,h2", "has several hosts; write sentinel:// or redis+cluster:// for several servers"),
    ("redis://h/x", "must have a number as database, or none"),
    ("redis://h?ssl_ca_certs=/hunter2", "has an unknown option after its ?; options of redis:// are: none"),
    ("rediss://h?verify=1", "has an unknown option after its ?; options of rediss:// are: ssl_ca_certs, ssl_cert_reqs"),
    ("rediss://h?ssl_cert_reqs=optional", "must have required or none as ssl_cert_reqs"),
    ("rediss://h?ssl_check_hostname=maybe", "must have true or false as ssl_check_hostname"),
    ("rediss://h?ssl_certfile=/c.pem", "must have both ssl_certfile and ssl_keyfile, or neither"),
    ("redis+socket://", "must have the absolute path of the socket, as in redis+socket:///run/redis.sock"),
    ("redis+socket://run/redis.sock", "must have the absolute path of the socket"),
    ("sentinel://h1,h2/0", "must name the master that the Sentinels watch, as in sentinel://host1,host2/0?master=name"),
    ("sentinel://h1;sentinel://h2/0?master=m", "must have a host, and a port from 1 to 65535"),
    ("redis+cluster://h/1", "must have no database: a Redis Cluster has only database 0"),
]


@pytest.mark.parametrize(("address", "sentence"), INVALID_ADDRESSES)
@pytest.mark.parametrize("name", ["REDIS_URL", "BROKER_URL"])
def test_invalid_address_stops_the_start_with_one_sentence(name: str, address: str, sentence: str) -> None:
    """The sentence has the name of the variable, and no part of the address."""
    with pytest.raises(ConfigurationError) as error_info:
        load_rejecting_unknown({f"PAYREADY_{name}": address})
    assert str(error_info.value).startswith(f"PAYREADY_{name} {sentence}")
    assert "hunter2" not in str(error_info.value)
    assert "ter2" not in str(error_info.value)


@pytest.mark.parametrize("hosts", ["h ", "h%20", "h\u00a0", "h1, h2", "h\u0661", "h:\u0661"])
def test_host_has_only_the_characters_of_a_name(hosts: str) -> None:
    """The settings refuse most other characters before. The parser does not depend on it."""
    with pytest.raises(AddressError, match="must have a host"):
        parse_redis_address(f"sentinel://{hosts}/0?master=m")


def test_parser_raises_only_its_own_error() -> None:
    with pytest.raises(AddressError):
        parse_redis_address("http://h")


CLUSTER = "redis+cluster://h1:1,h2:2"


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"REDIS_URL": CLUSTER}, "BROKER_URL must be set: PAYREADY_REDIS_URL names a Redis Cluster"),
        (
            {"REDIS_URL": CLUSTER, "BROKER_URL": "amqp://b"},
            "RESULT_BACKEND_URL must be set: PAYREADY_REDIS_URL names a Redis Cluster, which Celery cannot",
        ),
        (
            {"BROKER_URL": CLUSTER},
            "BROKER_URL must name a server or Sentinels: Celery cannot use a Redis Cluster",
        ),
        ({"RESULT_BACKEND_URL": CLUSTER}, "RESULT_BACKEND_URL must name a server or Sentinels: Celery cannot use"),
        ({"BROKER_URL": "sqs://key:hunter2@"}, f"BROKER_URL must begin with {SCHEMES.replace(' or', ',')}, amqp:// or"),
        ({"RESULT_BACKEND_URL": "nonsense"}, "RESULT_BACKEND_URL must begin with redis://"),
        ({"RESULT_BACKEND_URL": "redis://h?x=1"}, "RESULT_BACKEND_URL has an unknown option"),
    ],
)
def test_unusable_combination_is_refused(environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as error_info:
        load_rejecting_unknown({f"PAYREADY_{name}": value for name, value in environ.items()})
    assert str(error_info.value).startswith(f"PAYREADY_{sentence}")


@pytest.mark.parametrize("results", ["redis://q/1", "rpc://", "db+postgresql://h/d", SENTINELS])
def test_cluster_with_another_broker_and_result_backend_is_accepted(results: str) -> None:
    addresses = {"REDIS_URL": CLUSTER, "BROKER_URL": "amqp://b", "RESULT_BACKEND_URL": results}
    load_rejecting_unknown({f"PAYREADY_{name}": value for name, value in addresses.items()})


AMQP = "must be amqp://user:password@host:port/name"
INVALID_OTHER_ADDRESSES = [
    ("BROKER_URL", "amqp://", AMQP),
    ("BROKER_URL", "amqp://h:hunter2//", AMQP),
    ("BROKER_URL", "amqp://u:hunter2[@h", AMQP),
    ("BROKER_URL", "amqp://h:0", AMQP),
    ("BROKER_URL", "amqp://h1;redis://:hunter2@h2", AMQP),
    ("BROKER_URL", "amqp://u:hunter2;x@h", AMQP),
    ("BROKER_URL", "amqp://u:hunter2/x@h", "must have no @ after the host; percent-encode"),
    ("BROKER_URL", "amqps://h1;amqps://u:hunter2?x@h2", "must have no @ after the host; percent-encode"),
    ("BROKER_URL", "amqp://u:hunter2#x@h", "must have no @ after the host; percent-encode"),
    ("RESULT_BACKEND_URL", "db+postgresql://u:hunter2/x@h/d", "must have no @ after the host; percent-encode"),
]


@pytest.mark.parametrize(("name", "address", "sentence"), INVALID_OTHER_ADDRESSES)
def test_invalid_address_of_another_system_stops_the_start(name: str, address: str, sentence: str) -> None:
    """Otherwise a traceback, or the line `role.started`, has a part of the password."""
    with pytest.raises(ConfigurationError) as error_info:
        load_rejecting_unknown({f"PAYREADY_{name}": address})
    assert str(error_info.value).startswith(f"PAYREADY_{name} {sentence}")
    assert "hunter2" not in str(error_info.value)


@pytest.mark.parametrize(
    "url", ["amqp://guest:guest@h:5672//", "amqps://u:p%2F@h/name?ssl_ca_certs=/c", "amqp://h1;amqp://h2"]
)
def test_address_of_rabbitmq_is_accepted(url: str) -> None:
    assert load_rejecting_unknown({"PAYREADY_BROKER_URL": url}).effective_broker_url == url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://u:hunter2@h1:5672//;amqp://u:hunter2@h2:5672//", "amqp://h1:5672//;amqp://h2:5672//"),
        ("redis://:hunter2;x@h:1/0", "redis://h:1/0"),
        ("redis://:hunter2@x@h:1/0", "redis://h:1/0"),
        ("postgresql://u:hunter2@h1,h2:2/db?password=hunter2@x", "postgresql://h1,h2:2/db"),
        ("postgresql:///db?host=@socket&password=hunter2", "postgresql:///db"),
        ("sqlite:////folder/a@b.db", "sqlite:////folder/a@b.db"),
    ],
)
def test_address_is_shown_without_credentials(url: str, shown: str) -> None:
    assert without_credentials_and_query(url) == shown
