"""Jobs that Celery keeps or drops: with an ETA, expired or revoked. And queues that remote control pauses."""

import itertools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult
from redis import Redis

from demo.processes import procfile
from tasks.redis_source import unacked_keys
from tests.broker.conftest import OLDEST_S, RETRIES, VISIBILITY_TIMEOUT_S, retried_tasks
from tests.support.servers import Postgres
from tests.support.system import System, eventually, wait_until

pytestmark = pytest.mark.slow
UNACKED = unacked_keys("payments", "")[0]
WORKER_QUEUES = {"payments", "balances", "maintenance"}
_numbers = itertools.count(1)


@pytest.fixture
def payready(payready_on_each_broker: System) -> System:
    return payready_on_each_broker


@pytest.fixture
def redis(payready: System) -> Iterator[Redis]:
    """Return a client of the broker. A test that needs it is skipped on RabbitMQ."""
    if not is_redis(payready):
        pytest.skip("a test of Redis")
    with Redis.from_url(payready.redis_url, decode_responses=True) as client:
        yield client


def initiate(payready: System, **options: Any) -> tuple[str, "AsyncResult[Any]"]:
    number = next(_numbers)
    payment_id = f"pay_{number}"
    return payment_id, payready.initiate(payment_id, f"acct_prompt{number:06d}", timeout_s=60, options=options)


def initiate_with_eta(payready: System, countdown_s: float) -> tuple[str, "AsyncResult[Any]", datetime]:
    """Enqueue a job, and wait until a worker keeps it until its ETA."""
    eta = datetime.now(UTC) + timedelta(seconds=countdown_s)
    payment_id, job = initiate(payready, eta=eta)
    wait_until(lambda: is_scheduled(payready, job.id), 10, "a worker keeps the job")
    return payment_id, job, eta


def is_scheduled(payready: System, task_id: str) -> bool:
    """Return whether a worker keeps a job until its ETA, as `celery inspect scheduled` prints it."""
    scheduled = payready.service.control.inspect(timeout=1).scheduled() or {}
    return any(entry["request"]["id"] == task_id for entries in scheduled.values() for entry in entries)


def assert_runs_once_at(payready: System, payment_id: str, job: "AsyncResult[Any]", eta: datetime) -> None:
    """Assert that the job is accepted not before its ETA, soon after it, and that its message is acknowledged."""
    assert payready.rows("SELECT payment_id FROM payment WHERE payment_id = :id", id=payment_id) == []
    left_s = (eta - datetime.now(UTC)).total_seconds()
    assert left_s > 0, "the test took longer than the countdown, so it proves nothing"
    with started_tasks(payready) as started:
        assert job.get(timeout=left_s + 15)["state"] == "released"
        wait_until(lambda: job.id in started, 10, "the event of its start has arrived")
    assert started.count(job.id) == 1
    assert timedelta(0) <= payready.payment(payment_id)["requested_at"] - eta < timedelta(seconds=5)
    assert waiting_in_queue(payready) == 0
    if is_redis(payready):
        wait_until(lambda: payready.unacknowledged() == 0, 10, "the message is acknowledged")


@contextmanager
def started_tasks(payready: System) -> Iterator[list[str]]:
    """Return a list that gets the id of each task that a worker starts during the block."""
    started = list[str]()
    with payready.service.connection_for_read() as connection:
        on_start = {"task-started": lambda event: started.append(event["uuid"])}
        receiver = payready.service.events.Receiver(connection, handlers=on_start)
        thread = Thread(target=receiver.capture, kwargs={"limit": None, "timeout": None, "wakeup": False})
        thread.start()
        try:
            yield started
        finally:
            receiver.should_stop = True
            thread.join()


def is_redis(payready: System) -> bool:
    return str(payready.service.conf.broker_url).startswith("redis")


def waiting_in_queue(payready: System) -> int:
    """Return the number of jobs that no worker has."""
    if is_redis(payready):
        return payready.queue_lengths().get("payments", 0)
    with payready.service.connection_for_write() as connection:
        return int(connection.default_channel.queue_declare("payments", passive=True).message_count)


def disconnect_worker(payready: System, redis: Any) -> None:
    """Close all connections of the worker to Redis."""
    files = Path(f"/proc/{payready.pids['worker']}/fd").iterdir()
    sockets = {str(file.readlink()) for file in files if file.is_symlink()}
    connections = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ports = {int(fields[1].split(":")[1], 16) for fields in connections if f"socket:[{fields[9]}]" in sockets}
    addresses = [client["addr"] for client in redis.client_list() if int(client["addr"].split(":")[1]) in ports]
    assert len(addresses) > len(WORKER_QUEUES), "Celery's connections, and one of each queue"
    for address in addresses:
        redis.client_kill_filter(addr=address)


def deliveries(redis: Any) -> list[int]:
    """Return how often each unacknowledged job was delivered."""
    return [int(stored.split("\n")[0]) for stored in redis.hvals(UNACKED)]


@contextmanager
def second_worker(payready: System) -> Iterator[None]:
    """Run a second worker for the duration of the block. It is stopped with SIGTERM."""
    payready.processes.start("second", procfile()["worker"].replace("--hostname worker@", "--hostname second@"))
    payready.wait_for_consumer("second")
    try:
        yield
    finally:
        payready.kill("second", signal_number=signal.SIGTERM)


def test_eta_job_survives_lost_connections_and_no_second_worker_gets_it(payready: System, redis: Redis) -> None:
    """The countdown is longer than the visibility timeout."""
    with second_worker(payready):
        payment_id, job, eta = initiate_with_eta(payready, 2 * VISIBILITY_TIMEOUT_S + 2)
        disconnect_worker(payready, redis)
        fetched = datetime.now(UTC)
        age = timedelta(seconds=VISIBILITY_TIMEOUT_S + 2)
        wait_until(lambda: datetime.now(UTC) - fetched > age, 20, "the visibility timeout is over")
        assert deliveries(redis) == [1]
        assert is_scheduled(payready, job.id)
        assert payready.metric("beat", OLDEST_S) == 0, "a job that waits for its ETA is not late"
        assert_runs_once_at(payready, payment_id, job, eta)


def test_eta_job_is_kept_while_the_database_is_away(payready: System, redis: Redis, postgres_server: Postgres) -> None:
    """The worker that keeps it retries another job. A second worker waits for jobs."""
    payment_id, job, eta = initiate_with_eta(payready, 2 * VISIBILITY_TIMEOUT_S + 8)
    with postgres_server.while_stopped():
        _, other = initiate(payready)
        wait_until(lambda: len(deliveries(redis)) == 2, 10, "the worker retries a job")
        with second_worker(payready):
            start, age = datetime.now(UTC), timedelta(seconds=VISIBILITY_TIMEOUT_S + 2)
            wait_until(lambda: datetime.now(UTC) - start > age, 20, "the visibility timeout is over")
            assert deliveries(redis) == [1, 1]
    assert other.get(timeout=30)["state"] == "released"
    assert_runs_once_at(payready, payment_id, job, eta)


def test_eta_job_survives_a_killed_worker(payready: System) -> None:
    payment_id, job, eta = initiate_with_eta(payready, 2 * VISIBILITY_TIMEOUT_S + 4)
    payready.kill("worker")
    payready.start("worker")
    assert_runs_once_at(payready, payment_id, job, eta)


def test_eta_job_is_in_its_queue_after_a_graceful_stop(payready: System) -> None:
    """At once, not only after the visibility timeout."""
    payment_id, job, eta = initiate_with_eta(payready, 2 * VISIBILITY_TIMEOUT_S)
    payready.kill("worker", signal_number=signal.SIGTERM)
    assert waiting_in_queue(payready) == 1
    payready.start("worker")
    wait_until(lambda: is_scheduled(payready, job.id), 5, "the new worker keeps the job")
    assert_runs_once_at(payready, payment_id, job, eta)


def test_retried_jobs_are_in_their_queue_after_a_graceful_stop(payready: System, postgres_server: Postgres) -> None:
    """Those of a batch, and those that Celery has, because they have an expiry."""
    with postgres_server.while_stopped():
        jobs = [initiate(payready)[1], initiate(payready, expires=600)[1], initiate(payready)[1]]
        wait_until(lambda: waiting_in_queue(payready) < len(jobs), 10, "the worker has fetched jobs")
        payready.kill("worker", signal_number=signal.SIGTERM)
        assert waiting_in_queue(payready) == len(jobs)
    payready.start("worker")
    assert {job.get(timeout=30)["state"] for job in jobs} == {"released"}


def test_job_that_celery_has_is_retried_with_one_line(payready: System, postgres_server: Postgres) -> None:
    """It has an expiry, so it is processed by its task. Each retry is counted, and the age of the queue grows."""
    count = payready.metric("worker", RETRIES)
    log = payready.processes.log_of("worker")
    logged_before = len(log.read_text())
    with postgres_server.while_stopped():
        _, job = initiate(payready, expires=600)
        wait_until(lambda: payready.metric("worker", RETRIES) >= count + 3, 20, "the job was tried three times")
        if is_redis(payready):
            wait_until(lambda: payready.metric("beat", OLDEST_S) > 3, 20, "the age of the queue grows")
    assert job.get(timeout=30)["state"] == "released"
    assert retried_tasks(payready).count(job.id) == 1
    assert "raw_connection()" not in log.read_text()[logged_before:], "no traceback of the database"
    wait_until(lambda: payready.metric("beat", OLDEST_S) == 0, 10, "the queue is empty")


def test_job_that_expired_or_was_revoked_starts_no_payment(payready: System) -> None:
    """Revoked before its arrival, or while a worker keeps it."""
    expired = initiate(payready, expires=datetime.now(UTC) - timedelta(seconds=1))
    _, scheduled, _ = initiate_with_eta(payready, 3)
    payready.service.control.revoke(["revoked-before", scheduled.id], reply=True, timeout=2)
    revoked = initiate(payready, task_id="revoked-before")
    for _, job in (expired, revoked, ("", scheduled)):
        with pytest.raises(TaskRevokedError):
            job.get(timeout=15)
    accepted = initiate(payready, expires=600)
    assert accepted[1].get(timeout=20)["state"] == "released"
    for payment_id, _ in (expired, revoked):
        assert payready.rows("SELECT payment_id FROM payment WHERE payment_id = :id", id=payment_id) == []
    assert waiting_in_queue(payready) == 0


def test_paused_queue_is_not_fetched_from_until_it_is_resumed(payready: System) -> None:
    """A pause costs no CPU, and outlives a lost connection."""
    control, worker = payready.service.control, {"reply": True, "timeout": 2, "destination": [worker_name(payready)]}
    assert active_queues(payready) == WORKER_QUEUES
    [reply] = control.cancel_consumer("payments", **worker)
    assert "ok" in reply[worker_name(payready)]
    assert active_queues(payready) == WORKER_QUEUES - {"payments"}
    cpu_s = cpu_seconds(payready.pids["worker"])
    wait_until(elapsed(1.5), 5, "the last fetch is over")
    _, job = initiate(payready)
    if is_redis(payready):
        with Redis.from_url(payready.redis_url, decode_responses=True) as redis:
            disconnect_worker(payready, redis)
    wait_until(elapsed(3), 5, "time to fetch it")
    assert waiting_in_queue(payready) == 1
    assert cpu_seconds(payready.pids["worker"]) - cpu_s < 2, "of 4.5 s"
    wait_until(lambda: active_queues(payready) == WORKER_QUEUES - {"payments"}, 10, "the queue is still paused")
    control.add_consumer("payments", **worker)
    assert job.get(timeout=20)["state"] == "released"
    assert active_queues(payready) == WORKER_QUEUES


def worker_name(payready: System) -> str:
    replies = eventually(lambda: payready.service.control.ping(timeout=1))
    return next(str(name) for reply in replies for name in reply if name.startswith("worker@"))


def active_queues(payready: System) -> set[str]:
    """Return the queues of the worker, as `celery inspect active_queues` prints them."""
    name = worker_name(payready)
    by_worker = payready.service.control.inspect(timeout=5, destination=[name]).active_queues() or {}
    return {queue["name"] for queue in by_worker[name]}


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def elapsed(seconds: float) -> Callable[[], bool]:
    end = datetime.now(UTC) + timedelta(seconds=seconds)
    return lambda: datetime.now(UTC) > end
