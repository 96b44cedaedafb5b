"""The servers behind the broker's and the result backend's addresses: product, address, role and round trip."""

import time
from collections.abc import Mapping
from typing import Any

from celery import Celery
from celery.backends.redis import RedisBackend

from cli.render import milliseconds_text
from config.addresses import without_credentials_and_query
from config.celery_config import celery_settings
from config.settings import Settings
from tasks.celery_connection import BROKER_ERRORS, connected_celery_app, report_unavailable
from tasks.celery_errors import CeleryUnavailable
from tasks.result_store import require_usable_result_backend
from worker.errors import error_summary


def describe_broker(settings: Settings) -> str:
    """Return the broker's product, address, role and round trip.

    Raises:
        CeleryUnavailable: there is no broker.
    """
    with connected_celery_app(settings) as app, report_unavailable(), app.connection_for_write() as connection:
        channel = connection.default_channel
        if connection.transport.driver_type == "redis":
            return _describe_redis(settings.effective_broker_url, channel.client)
        started_at = time.monotonic()
        connection.channel().close()
        round_trip_s = (time.monotonic() - started_at) / 2  # one to open it, one to close it
        properties = channel.connection.server_properties
        product = f"{properties.get('product')} {properties.get('version')}"
        address = address_without_credentials(settings.effective_broker_url)
        return f"{product} at {address}, {milliseconds_text(round_trip_s)}"


def describe_result_backend(settings: Settings) -> str:
    """Return the product, the address, the role and the round trip of the result backend.

    Raises:
        CeleryUnavailable: it does not respond.
        ConfigurationError: Celery cannot use it here.
    """
    with Celery("payready-cli", set_as_current=False) as app:
        app.conf.update(celery_settings(settings), database_create_tables_at_setup=False)
        require_usable_result_backend(app)
        try:
            _read_from(app.backend)
            if isinstance(app.backend, RedisBackend):
                return _describe_redis(settings.effective_result_backend_url, app.backend.client)
        except BROKER_ERRORS as error:
            raise CeleryUnavailable(str(error).rstrip(".")) from None
        except Exception as error:  # noqa: BLE001 - each kind of result backend has errors of its own
            raise CeleryUnavailable(error_summary(error)) from None
        return f"responds at {address_without_credentials(settings.effective_result_backend_url)}"


def _read_from(backend: Any) -> None:
    sessions = getattr(backend, "session_manager", None)
    if sessions is None:
        backend.get_task_meta("payready-doctor")
    else:  # of a database: Celery would try for 10 s to create its tables
        sessions.get_engine(backend.url).connect().close()


def _describe_redis(url: str, client: Any) -> str:
    client.ping()  # connects
    started_at = time.monotonic()
    client.ping()
    return redis_description(url, client.info(), time.monotonic() - started_at)


def redis_description(url: str, info: Mapping[str, Any], round_trip_s: float) -> str:
    """Return the product, the address, the role and the round trip of the Redis server with this INFO."""
    name, version = ("Valkey", info.get("valkey_version")) if "valkey_version" in info else ("Redis", None)
    product = f"{name} {version or info.get('redis_version')}"
    role = "read-only replica" if is_read_only_replica(info) else "replica" if _is_replica(info) else "primary"
    mode = info.get("server_mode", info.get("redis_mode", "standalone"))
    roles = role if mode == "standalone" else f"{role}, {mode}"
    return f"{product} at {address_without_credentials(url)}, {roles}, {milliseconds_text(round_trip_s)}"


def is_read_only_replica(info: Mapping[str, Any]) -> bool:
    """Return whether the Redis server with this INFO is a replica that refuses writes."""
    return _is_replica(info) and bool(info.get("slave_read_only", 1))


def _is_replica(info: Mapping[str, Any]) -> bool:
    return info.get("role") == "slave"


def no_response_text(url: str, problem: str) -> str:
    """Return the address of a server that does not respond, with the error of its client."""
    return f"{address_without_credentials(url)} does not respond: {problem}"


def address_without_credentials(url: str) -> str:
    """Return an address without its scheme, its user, its password and its options, which may have passwords too."""
    return without_credentials_and_query(url).partition("://")[2].rstrip("/")
