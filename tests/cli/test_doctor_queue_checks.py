"""Lists that the doctor finds on a real Valkey, with messages of real Celery apps."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from cli.doctor_queue_checks import check_unread_lists, fix_of_misplaced_jobs
from cli.doctor_results import CheckContext, Severity
from config.celery_config import celery_settings
from config.settings import Settings
from tasks import broker_lists
from tests.cli.conftest import LedgerBuilder
from worker.runtime import build_runtime

pytestmark = pytest.mark.slow

NONE_FOUND = [(Severity.OK, "no job and no callback is in a list that no worker reads")]
JOB = {"payment_id": "pay_1", "account_id": "acct_a"}


@pytest.fixture
def redis(valkey_url: str) -> Iterator[Redis]:
    """An empty database of its own."""
    with Redis.from_url(valkey_url.removesuffix("/0") + "/7") as client:
        client.flushdb()
        yield client


class Doctor:
    """The check with these settings."""

    def __init__(self, redis: Redis, **settings: Any) -> None:
        port = redis.connection_pool.connection_kwargs["port"]
        self.url = f"redis://127.0.0.1:{port}/7"
        self.settings = Settings(redis_url=self.url, **settings)

    def send(self, task: str, queue: str, options: dict[str, Any] | None = None, **message: Any) -> None:
        """Send a task as an app with these transport options does."""
        with Celery("sender", broker=self.url, set_as_current=False) as app:
            app.conf.broker_transport_options = options or {}
            app.send_task(task, kwargs=JOB, queue=queue, ignore_result=True, **message)

    def results(self) -> list[tuple[Severity, str]]:
        """Run the check."""
        rt = build_runtime(self.settings)
        context = CheckContext(settings=self.settings, rt=rt, flower_url="", web_url="", dashboard_url="")
        try:
            return [(result.severity, result.message) for result in check_unread_lists(context)]
        finally:
            rt.engine.dispose()


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"priority_steps": list(range(10))}, r"payments\x06\x165"),
        ({"sep": ":"}, "payments:3"),
        ({"global_keyprefix": "svc:"}, r"svc:payments\x06\x163"),
    ],
    ids=str,
)
def test_doctor_finds_jobs_of_sender_with_other_options(redis: Redis, options: dict[str, Any], shown: str) -> None:
    """With equal settings it finds none."""
    doctor = Doctor(redis)
    doctor.send("payments.initiate", "payments", options, priority=5)
    message = f"1 message in the list {shown}, which no worker of payready reads: payments.initiate"
    assert doctor.results() == [(Severity.ERROR, message)]
    names = {
        "priority_steps": "broker_priority_steps",
        "sep": "broker_priority_separator",
        "global_keyprefix": "broker_key_prefix",
    }
    assert Doctor(redis, **{names[name]: value for name, value in options.items()}).results() == NONE_FOUND


def test_doctor_finds_jobs_without_the_prefix_of_payready(redis: Redis) -> None:
    doctor = Doctor(redis, broker_key_prefix="svc:")
    doctor.send("payments.initiate", "payments")
    [(severity, message)] = doctor.results()
    assert (severity, message.split(",")[0]) == (Severity.ERROR, "1 message in the list payments")


def test_doctor_only_warns_of_jobs_in_the_queue_of_another_instance(redis: Redis) -> None:
    """Another deployment may read it: its workers do not respond to this one."""
    doctor = Doctor(redis, instance="live")
    for queue in ("payments", "live.payments", "test.payments"):
        doctor.send("payments.initiate", queue)
    found = [(severity, message.split(",")[0]) for severity, message in doctor.results()]
    assert found == [(Severity.WARNING, f"1 message in the list {key}") for key in ("payments", "test.payments")]


def test_doctor_finds_jobs_in_the_default_queue(redis: Redis) -> None:
    """A sender forgot the queue. The messages of another app before and after it do not hide it."""
    doctor = Doctor(redis)
    for task in ("mail.send", "payments.initiate", "mail.send"):
        doctor.send(task, "celery")
    assert doctor.results() == [
        (Severity.ERROR, "3 messages in the list celery, which no worker of payready reads: payments.initiate")
    ]


def test_doctor_finds_jobs_of_message_protocol_1(redis: Redis) -> None:
    doctor = Doctor(redis)
    with Celery("sender", broker=doctor.url, set_as_current=False) as app:
        app.conf.task_protocol = 1
        app.send_task("payments.cancel", ("pay_1",), queue="svc/payments")
    [(severity, message)] = doctor.results()
    assert (severity, "payments.cancel" in message) == (Severity.ERROR, True)


def test_doctor_finds_callbacks_that_no_worker_fetches(redis: Redis, ledger: LedgerBuilder) -> None:
    """The parent of a callback is a task of a payment."""
    ledger.payment("pay_1", "acct_a")
    doctor = Doctor(redis, database_url=ledger.url)
    doctor.send("ledger.execute_ach", "celery", parent_id="task-pay_1")
    doctor.send("ledger.execute_ach", "svc", parent_id="task-pay_1", priority=6)
    doctor.send("mail.send", "mail", parent_id="another-task")
    assert doctor.results() == [
        (Severity.WARNING, "1 message in the list celery, which no worker reads: callbacks of payments"),
        (Severity.WARNING, r"1 message in the list svc\x06\x166, which no worker reads: callbacks of payments"),
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"broker_priority_steps": tuple(range(10)), "broker_priority_separator": ":"},
        {"broker_key_prefix": "svc:"},
    ],
    ids=str,
)
def test_doctor_reports_neither_own_lists_nor_those_of_other_apps(redis: Redis, settings: dict[str, Any]) -> None:
    """Also not kombu's bindings, unacknowledged messages, and lists that hold no Celery messages."""
    doctor = Doctor(redis, **settings)
    options = celery_settings(doctor.settings)["broker_transport_options"]
    for priority in range(10):
        doctor.send("payments.initiate", "payments", options, priority=priority)
        doctor.send("balances.refresh", "refreshes", options, priority=priority)
    doctor.send("mail.send", "celery", options)
    doctor.send("cards.charge", "card_payments", priority=9)
    redis.rpush("payments:errors", "not JSON", "[]", "null", '{"body": 1}', '{"headers": []}', b"\xff" * 9, "[" * 9000)
    redis.hset("payready-unacked", "tag", json.dumps([{"headers": {"task": "payments.initiate"}}, "", "payments"]))
    assert redis.keys("*_kombu.binding.*")
    assert doctor.results() == NONE_FOUND


def test_doctor_reports_no_list_that_is_read(redis: Redis) -> None:
    """Another deployment may have other options. Its list is never empty here, but its messages are fetched."""
    doctor = Doctor(redis)
    doctor.send("payments.initiate", "payments", {"global_keyprefix": "other:"})
    with _consumer_of_a_busy_list(redis, "other:payments"):
        assert doctor.results() == NONE_FOUND


@contextmanager
def _consumer_of_a_busy_list(redis: Redis, key: str) -> Iterator[None]:
    ended = Event()

    def rotate() -> None:
        numbers = itertools.count()
        while not ended.wait(0.05):
            redis.lpush(key, json.dumps({"headers": {"task": "payments.initiate", "id": next(numbers)}}))
            redis.rpop(key)

    thread = Thread(target=rotate)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_doctor_states_that_its_search_was_cut(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large database is not searched to its end."""
    monkeypatch.setattr(broker_lists, "MAX_KEYS", 2000)
    redis.mset({f"other:{number}": 1 for number in range(5000)})
    assert Doctor(redis).results() == [
        (Severity.WARNING, "searched the first 2000 keys of the broker's database: it has more keys or lists")
    ]


def test_doctor_bounds_the_lists_that_it_reads(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_lists, "MAX_LISTS", 25)
    doctor = Doctor(redis)
    for number in range(30):
        doctor.send("payments.initiate", f"payments.{number}")
    results = doctor.results()
    assert results[20:] == [
        (Severity.ERROR, "5 more lists"),
        (Severity.WARNING, "searched the first 1000 keys of the broker's database: it has more keys or lists"),
    ]


def test_many_lists_of_other_apps_do_not_hide_jobs(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_lists, "MAX_LISTS", 25)
    for number in range(100):
        redis.rpush(f"other:{number}", "x")
    doctor = Doctor(redis)
    doctor.send("payments.initiate", "payments", {"sep": ":"}, priority=5)
    assert [severity for severity, _ in doctor.results()] == [Severity.ERROR, Severity.WARNING]


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("payments:5", r"sep=':', and PAYREADY_BROKER_PRIORITY_SEPARATOR is '\x06\x16' and priority_steps with 5, "),
        ("payments\x06\x167", "has priority_steps with 7, and PAYREADY_BROKER_PRIORITY_STEPS is 0,3,6,9: "),
        ("svc:refreshes", "has global_keyprefix='svc:', and PAYREADY_BROKER_KEY_PREFIX is '': "),
        ("celery", 'send the jobs with queue="payments"'),
        (
            "test.payments",
            'has queue="test.payments", and PAYREADY_INSTANCE is not set, so that the queue is "payments": ',
        ),
    ],
)
def test_fix_names_the_setting_that_differs(key: str, part: str) -> None:
    assert part in fix_of_misplaced_jobs(Settings(), key)


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("svc.payments", 'has queue="payments", and PAYREADY_INSTANCE is live, so that the queue is "live.payments": '),
        ("svc.live.payments:5", "has sep=':', "),
        ("live.payments", "has global_keyprefix='', and PAYREADY_BROKER_KEY_PREFIX is 'svc.': "),
        ("celery", 'send the jobs with queue="live.payments"'),
    ],
)
def test_fix_names_the_queue_of_the_instance(key: str, part: str) -> None:
    assert part in fix_of_misplaced_jobs(Settings(instance="live", broker_key_prefix="svc."), key)
