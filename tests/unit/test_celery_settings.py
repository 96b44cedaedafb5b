"""Celery accepts a misspelt key in silence, so ours are held against its own lists."""

import inspect

import pytest
from celery.app.defaults import NAMESPACES, flatten
from celery.backends import redis
from celery.beat import ScheduleEntry
from kombu.utils.url import parse_url

from config.celery_config import QUEUES, celery_settings
from config.settings import Settings
from tasks.broker import RedisTransport

KNOWN = dict(flatten(NAMESPACES))
READ_BUT_NOT_LISTED = {"redis_backend_health_check_interval"}
"""Keys that Celery reads and documents, and forgot in its list of defaults."""
SETTINGS = celery_settings(Settings())


def test_each_key_is_one_that_celery_knows() -> None:
    """By Celery's own defaults, or by the line that reads it."""
    assert set(SETTINGS) - set(KNOWN) <= READ_BUT_NOT_LISTED
    for key in READ_BUT_NOT_LISTED:
        assert f"'{key}'" in inspect.getsource(redis)


def test_a_misspelt_key_would_be_found() -> None:
    """The list is not a list of everything."""
    assert "task_ack_late" not in KNOWN
    assert "task_acks_late" in KNOWN


def test_each_option_of_the_broker_is_one_that_its_transport_knows() -> None:
    """By its own list, which is kombu's and one more."""
    options = SETTINGS["broker_transport_options"]
    assert options
    assert set(options) - set(RedisTransport.Channel.from_transport_options) == set()


def test_another_broker_gets_no_options_of_redis() -> None:
    """They would mean something else there, or nothing."""
    assert celery_settings(Settings(broker_url="sqs://b"))["broker_transport_options"] == {}


def test_on_rabbitmq_queues_are_quorum_queues_and_what_is_sent_is_confirmed() -> None:
    """Those that a callback names too: a queue is declared by whoever comes first."""
    assert parse_url("amqp://b")["transport"] == "amqp"
    settings = celery_settings(Settings(broker_url="amqp://b"))
    assert settings["broker_transport_options"] == {"confirm_publish": True}
    assert [queue.queue_arguments for queue in settings["task_queues"]] == [{"x-queue-type": "quorum"}] * len(QUEUES)
    assert settings["task_create_missing_queue_type"] == "quorum"


def test_each_task_that_is_routed_exists_and_each_goes_to_a_queue_of_ours() -> None:
    """A route to a queue that nobody consumes is a task that is never run."""
    from tasks.app import app  # noqa: PLC0415 - it reads the environment

    app.loader.import_default_modules()
    ours = {
        name
        for name in app.tasks
        if name.split(".")[0] in ("payments", "balances", "outcomes", "quarantine", "webhooks")
    }
    routes = SETTINGS["task_routes"]
    assert set(routes) == ours
    assert {route["queue"] for route in routes.values()} == set(QUEUES)


def test_the_beat_calls_tasks_that_exist() -> None:
    """And a tick that is late is thrown away, for the next one does its work."""
    for entry in SETTINGS["beat_schedule"].values():
        assert entry["task"] in SETTINGS["task_routes"]
        seconds = ScheduleEntry(**entry, name="x").schedule.seconds
        assert seconds == {"webhooks.check_subscription": 60, "quarantine.prune": 600}.get(entry["task"], 1)
        assert entry["options"]["expires"] <= max(10, seconds / 2)


@pytest.mark.parametrize("key", ["task_acks_late", "task_reject_on_worker_lost"])
def test_a_message_is_not_lost_with_its_worker(key: str) -> None:
    """Acknowledged after the task, and given back when its worker dies."""
    assert SETTINGS[key] is True
