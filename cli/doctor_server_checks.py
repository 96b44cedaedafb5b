"""Checks of `payready doctor` on the servers behind the addresses: their roles, versions, latencies and replication."""

from collections.abc import Iterator, Mapping
from time import monotonic
from typing import Any

from cli import server_probes
from cli.doctor_results import CheckContext, CheckResult, error, ok, warning
from cli.render import milliseconds_text
from config.settings import ConfigurationError
from tasks.celery_errors import CeleryUnavailable
from worker.correlation.redis_client import REDIS_UNAVAILABLE
from worker.errors import error_summary
from worker.ledger import schema
from worker.ledger.engine import DATABASE_UNAVAILABLE, NoDatabaseFile, UnconfiguredPooler, read_snapshot
from worker.ledger.server_state import DatabaseServer, read_server
from worker.rules.decimals import count_text

MEMORY_WARNING_RATIO = 0.9
_FIX_OF_READ_ONLY = "give PAYREADY_DATABASE_URL the primary's address, or all addresses of the cluster"
_MIGRATE = "run the role `release`: alembic upgrade head"
_GUIDE = "docs/howto/recover-after-failover.md"


def check_database(context: CheckContext) -> Iterator[CheckResult]:
    """Check that the database responds, accepts writes, replicates safely and has the schema of this release."""
    try:
        server = read_server(context.rt.engine)
        with read_snapshot(context.rt.engine) as tx:
            current, required = schema.current_revision(tx), schema.required_revision()
    except NoDatabaseFile as missing:
        yield error("database", str(missing), f"correct the setting, or {_MIGRATE}")
        return
    except UnconfiguredPooler:
        address = server_probes.address_without_credentials(context.settings.database_url)
        message = f"{address} is a connection pooler: statements would reach sessions of other clients"
        yield error("database", message, "set PAYREADY_DATABASE_POOLER=transaction")
        return
    except DATABASE_UNAVAILABLE as unavailable:
        message = server_probes.no_response_text(context.settings.database_url, error_summary(unavailable))
        yield error("database", message, "start it, or correct PAYREADY_DATABASE_URL")
        return
    described = f"{server.product} at {server.address}, {server.role}, {milliseconds_text(server.round_trip_s)}"
    if server.is_read_only:
        yield error("database", f"{described}: no job and no webhook can be committed", _FIX_OF_READ_ONLY)
    elif current == required:
        yield ok("database", f"{described}, at revision {current}")
    if current != required:
        state = f"at revision {current}" if current else "never migrated"
        yield error("database", f"{state}; this release needs {required}", _MIGRATE)
    yield from replication_results(server)


def replication_results(server: DatabaseServer) -> Iterator[CheckResult]:
    """Judge the replication of a primary with standbys: a warning if a failover may lose commits."""
    if not server.standby_count:
        return
    standbys = count_text(server.standby_count, "standby", "standbys")
    if server.is_replication_synchronous:
        yield ok("replication", f"{standbys}, synchronous")
        return
    message = (
        f"{standbys}, asynchronous: a failover may lose the last commits. Then calls have no fee entry, "
        "tasks wait for ever, and payments get a second outcome"
    )
    fix = f"set synchronous_standby_names, and synchronous_commit=on, on the primary; see {_GUIDE}"
    yield warning("replication", message, fix)


def check_redis_memory_and_persistence(context: CheckContext) -> Iterator[CheckResult]:
    """Check that the Redis of the correlation store accepts writes, has free memory and does not lose data."""
    try:
        context.rt.redis_server.time()  # connects
        started_at = monotonic()
        context.rt.redis_server.time()
        round_trip_s = monotonic() - started_at
        info = context.rt.redis_server.info()
        used_ratio = context.rt.redis_server.memory_used_ratio()
    except REDIS_UNAVAILABLE as unavailable:
        message = server_probes.no_response_text(context.settings.redis_url, str(unavailable))
        yield error("redis", message, "start it, or correct PAYREADY_REDIS_URL")
        return
    described = server_probes.redis_description(context.settings.redis_url, info, round_trip_s)
    if server_probes.is_read_only_replica(info):
        yield error("redis", f"{described}: nothing can be stored", "give PAYREADY_REDIS_URL the primary's address")
    else:
        yield ok("redis", described)
    if used_ratio >= MEMORY_WARNING_RATIO:
        yield error("redis", f"{used_ratio:.0%} of maxmemory is used", "raise maxmemory, or find the queue that grows")
    yield from _persistence_results(info)


def _persistence_results(info: Mapping[str, Any]) -> Iterator[CheckResult]:
    policy = info.get("maxmemory_policy", "unknown")
    if policy != "noeviction":
        fix = "set maxmemory-policy noeviction: eviction deletes queued messages"
        yield error("redis", f"maxmemory-policy is {policy}", fix)
    if not info.get("aof_enabled"):
        yield warning("redis", "no append-only file", "set appendonly yes: a restart loses queued jobs")
    elif info.get("aof_last_write_status", "ok") != "ok":
        yield error("redis", "cannot write its append-only file", "check the disk of Redis")


def check_result_backend(context: CheckContext) -> Iterator[CheckResult]:
    """Check that the result backend responds."""
    try:
        described = server_probes.describe_result_backend(context.settings)
    except ConfigurationError as unusable:
        yield error("result backend", str(unusable), "correct the setting, or install the package")
    except CeleryUnavailable as unavailable:
        message = server_probes.no_response_text(context.settings.effective_result_backend_url, unavailable.problem)
        yield error("result backend", message, "start it, or correct PAYREADY_RESULT_BACKEND_URL")
    else:
        yield ok("result backend", described)
