"""Redis beyond one server: a cluster, separate servers, TLS, a Unix socket, users with the least rights."""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from demo.processes import ROOT, procfile
from tests.support.load_assertions import assert_one_outcome_each, have_outcomes, jobs
from tests.support.servers import Postgres
from tests.support.system import ROLES, System, system, wait_until
from tests.topologies.redis_servers import (
    TLS_BINARY,
    TLS_UNAVAILABLE_REASON,
    RedisServerProcess,
    TlsServer,
    cluster_servers,
    make_certificates,
)
from worker.correlation.admission import AdmissionControl, AnnouncedAdmission
from worker.correlation.redis_client import REDIS_UNAVAILABLE, RedisServer, create_client, open_redis
from worker.correlation.store import AccountState, CalledRefresh, CorrelationStore, JoinRequest, NewRefreshBalance

pytestmark = [
    pytest.mark.topology,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # see test_sentinel.py
]
RETRIES = 'payready_retried_tasks_total{task="payments.initiate"}'
NOW = datetime(2026, 11, 30, tzinfo=UTC)


@pytest.fixture
def valkeys(tmp_path: Path) -> Iterator[list[RedisServerProcess]]:
    """Run three servers that know nothing of each other."""
    with ExitStack() as stack:
        yield [stack.enter_context(RedisServerProcess(tmp_path / f"valkey{n}")) for n in range(3)]


def _url(server: RedisServerProcess) -> str:
    return f"redis://127.0.0.1:{server.port}/0"


def _assert_jobs_are_processed(payready: System, *, prefix: str = "pay") -> None:
    """Process jobs whose results and callbacks reach the payments service."""
    payready.start_service()
    sent = [{**job, "payment_id": f"{prefix}{n}"} for n, job in enumerate(jobs("prompt", 40, 10, max_balance_age_s=60))]
    payready.initiate_many(sent, linked=True)
    wait_until(have_outcomes(payready, len(sent)), 60, "all payments are resolved")
    assert_one_outcome_each(payready, {str(job["payment_id"]) for job in sent})
    result = payready.initiate(f"{prefix}_result", "acct_prompt000001", max_balance_age_s=60)
    assert result.get(timeout=30)["payment_id"]


def _keys(server: RedisServerProcess) -> set[str]:
    with server.client() as client:
        return {key.decode() for key in client.scan_iter()}


def test_separate_servers_for_store_broker_and_results(
    tmp_path: Path, postgres_server: Postgres, valkeys: list[RedisServerProcess]
) -> None:
    """Each has only its own keys."""
    store, broker, results = valkeys
    addresses = {
        "PAYREADY_REDIS_URL": _url(store),
        "PAYREADY_BROKER_URL": _url(broker),
        "PAYREADY_RESULT_BACKEND_URL": _url(results),
    }
    with system(tmp_path, postgres_server.database(), *ROLES, **addresses) as payready:
        _assert_jobs_are_processed(payready)
        assert all(key.startswith("payready:") for key in _keys(store))
        assert any(key.startswith("payready:{acct_prompt") for key in _keys(store))
        assert all(key.startswith("celery-task-meta-") for key in _keys(results))
        assert len(_keys(results)) > 0
        assert not any(key.startswith(("celery-task-meta-", "payready:")) for key in _keys(broker))


def test_roles_run_over_a_unix_socket(tmp_path: Path, postgres_server: Postgres) -> None:
    """The server listens on no port."""
    path = tmp_path / "r.sock"
    server = RedisServerProcess(tmp_path / "valkey", "--unixsocket", path, port=0, unix_socket_path=str(path))
    url = f"redis+socket://{path}?virtual_host=3"
    with server, system(tmp_path, postgres_server.database(), *ROLES, PAYREADY_REDIS_URL=url) as payready:
        _assert_jobs_are_processed(payready)
        with server.client() as client:
            assert set(client.info("keyspace")) == {"db3"}


@pytest.mark.skipif(not TLS_BINARY.exists(), reason=TLS_UNAVAILABLE_REASON)
def test_roles_run_with_a_private_authority_and_client_certificates(tmp_path: Path, postgres_server: Postgres) -> None:
    """Without the certificates no connection is made."""
    files = make_certificates(tmp_path / "certificates")
    with TlsServer(tmp_path / "redis", files) as server:
        base = f"rediss://localhost:{server.port}/0"
        ca, certificate = f"ssl_ca_certs={files}/ca.pem", f"ssl_certfile={files}/client.pem"
        url = f"{base}?{ca}&{certificate}&ssl_keyfile={files}/client.key"
        for insufficient in (base, f"{base}?{ca}", url.replace("localhost", "127.0.0.1")):
            with open_redis(insufficient) as client, pytest.raises(RedisConnectionError):
                client.ping()
        with system(tmp_path, postgres_server.database(), *ROLES, PAYREADY_REDIS_URL=url) as payready:
            _assert_jobs_are_processed(payready)


def _accounts(count: int) -> list[str]:
    return [f"acct_{number}" for number in range(count)]


def _join(store: CorrelationStore, accounts: list[str]) -> list[str]:
    requests = [
        JoinRequest(account_id=account, refresh_id=f"ref_{account}", min_balance_at=NOW, min_called_at=NOW)
        for account in accounts
    ]
    return [result.kind for result in store.reuse_balance_or_join_refresh(requests)]


def test_correlation_store_works_on_a_cluster(tmp_path: Path) -> None:
    """Batches spread over all nodes, also after a node has lost its scripts."""
    with cluster_servers(tmp_path) as nodes:
        url = "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in (1, nodes[0].port))
        with create_client(url) as redis:
            store, accounts = CorrelationStore(redis), _accounts(50)
            assert _join(store, accounts) == ["leader"] * 50
            assert min(len(_keys(node)) for node in nodes) > 0
            cast(Any, nodes[1].client()).script_flush()
            called = [CalledRefresh(account_id=a, refresh_id=f"ref_{a}", called_at=NOW) for a in accounts]
            store.move_requested_to_in_flight(called)
            assert _join(store, accounts) == ["joined"] * 50
            balances = [NewRefreshBalance(account_id=a, balance_id=f"bal_{a}", at=NOW) for a in accounts]
            store.add_balances_and_clear_answered_refreshes(balances, timedelta(seconds=5))
            assert _join(store, accounts) == ["balance"] * 50
            store.clear_requested_or_in_flight_refresh("acct_1", "ref_acct_1")
            store.restore_account("acct_2", AccountState())
            assert _join(store, ["acct_2"]) == ["leader"]
            admission = AdmissionControl(
                redis, "digest", calls_per_s=20, failure_threshold=2, probe_timeout=timedelta(seconds=9)
            )
            assert admission.admit_calls_or_probe(NOW, 3, has_slot=False).granted == 3
            assert admission.status(NOW).open_until is None
            announced = AnnouncedAdmission(redis, key_prefix="", burst_duration=admission.limiter.burst_duration)
            announced.announce("digest", NOW)
            assert announced.statuses(NOW) == [admission.status(NOW)]
            assert abs(RedisServer(redis).time() - datetime.now(UTC)) < timedelta(seconds=60)
            cast(Any, nodes[2].client()).config_set("maxmemory", "100mb")
            assert 0 < RedisServer(redis).memory_used_ratio() < 1


def test_unavailable_cluster_raises_an_error_of_redis() -> None:
    """Callers continue without the store."""
    with create_client("redis+cluster://127.0.0.1:1") as redis, pytest.raises(REDIS_UNAVAILABLE):
        _join(CorrelationStore(redis), ["acct_1"])


def test_roles_run_with_a_cluster_as_correlation_store(
    tmp_path: Path, postgres_server: Postgres, valkeys: list[RedisServerProcess]
) -> None:
    """One of three nodes is killed, and started again. Jobs wait for it, and none is lost."""
    with cluster_servers(tmp_path / "cluster") as nodes:
        addresses = {
            "PAYREADY_REDIS_URL": "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes),
            "PAYREADY_BROKER_URL": _url(valkeys[1]),
            "PAYREADY_RESULT_BACKEND_URL": _url(valkeys[2]),
        }
        with system(tmp_path, postgres_server.database(), *ROLES, **addresses) as payready:
            _assert_jobs_are_processed(payready)
            assert len([node for node in nodes if _keys(node)]) > 1
            nodes[0].kill()
            sent = jobs("prompt", 30, 30, timeout_s=60)
            payready.initiate_many(sent, linked=True)
            wait_until(lambda: payready.metric("worker", RETRIES) > 0, 30, "a job waits for the store")
            nodes[0].start()
            wait_until(have_outcomes(payready, 40 + len(sent)), 90, "all payments are resolved")


GUIDE = ROOT / "docs/howto/use-redis-topologies.md"


def _documented_rights() -> dict[str, list[str]]:
    """Return the rights of each user in the guide."""
    lines = re.findall(r"^user (\S+) on >\S+ (.+)$", GUIDE.read_text(), re.MULTILINE)
    return {name: rights.split() for name, rights in lines}


def _restrict(server: RedisServerProcess, name: str, rights: list[str]) -> str:
    """Create a user with these rights. Return the server's address for it."""
    with server.client() as client:
        cast(Any, client).execute_command("ACL", "SETUSER", name, "on", ">secret", *rights)
    return f"redis://{name}:secret@127.0.0.1:{server.port}/0"


def _refused(server: RedisServerProcess, user: str) -> set[str]:
    """Return the commands, keys and channels that the server has refused to the user."""
    with server.client() as client:
        log: list[Mapping[str, Any]] = cast(Any, client).acl_log(100)
    return {f"{entry['reason']} {entry['object']}" for entry in log if entry["username"] == user}


def test_roles_need_no_more_rights_than_documented(
    tmp_path: Path, postgres_server: Postgres, valkeys: list[RedisServerProcess]
) -> None:
    """One user for each of store, broker and results. The payments service has all rights."""
    rights, names = _documented_rights(), ("PAYREADY_REDIS_URL", "PAYREADY_BROKER_URL", "PAYREADY_RESULT_BACKEND_URL")
    addresses = dict(zip(names, map(_url, valkeys), strict=True))
    rights["payready-broker"].append("~svc*")  # the queue of the payments service
    users = [_restrict(server, name, rights[name]) for server, name in zip(valkeys, rights, strict=True)]
    restricted = dict(zip(names, users, strict=True))
    with system(tmp_path, postgres_server.database(), *ROLES, **addresses) as payready:
        payready.kill(*ROLES)
        for role in ROLES:
            payready.processes.start(role, procfile()[role], **restricted)
        for role in ("worker", "refresh"):
            payready.wait_for_consumer(role)
        _assert_jobs_are_processed(payready)
        variables = " ".join(f"{name}={url}" for name, url in restricted.items())
        payready.processes.run("doctor", f"env {variables} payready doctor")
        with create_client(users[0]) as redis:
            announced = AnnouncedAdmission(redis, key_prefix="", burst_duration=timedelta(seconds=1))
            assert announced.statuses(datetime.now(UTC))
        refused = {name: _refused(server, name) for server, name in zip(valkeys, rights, strict=True)}
    assert refused == {name: set() for name in rights}
