"""Celery ignores a misspelt setting silently, so these tests compare payready's settings with Celery's own lists."""

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
"""Keys that Celery reads and documents, but that its list of defaults lacks."""
SETTINGS = celery_settings(Settings())


def test_celery_knows_each_setting() -> None:
    """Each key is in Celery's defaults, or in the source line that reads it."""
    assert set(SETTINGS) - set(KNOWN) <= READ_BUT_NOT_LISTED
    for key in READ_BUT_NOT_LISTED:
        assert f"'{key}'" in inspect.getsource(redis)


def test_celery_defaults_lack_a_misspelt_key() -> None:
    assert "task_ack_late" not in KNOWN
    assert "task_acks_late" in KNOWN


def test_transport_knows_each_broker_option() -> None:
    """The transport's list has kombu's options and one more."""
    options = SETTINGS["broker_transport_options"]
    assert options
    assert set(options) - set(RedisTransport.Channel.from_transport_options) == set()


def test_other_broker_gets_no_redis_options() -> None:
    """Another broker would ignore or misread them."""
    assert celery_settings(Settings(broker_url="sqs://b"))["broker_transport_options"] == {}


def test_rabbitmq_uses_quorum_queues_and_publisher_confirms() -> None:
    """This includes a callback's queue: the first producer or consumer declares a queue."""
    assert parse_url("amqp://b")["transport"] == "amqp"
    settings = celery_settings(Settings(broker_url="amqp://b"))
    assert settings["broker_transport_options"] == {"confirm_publish": True}
    assert [queue.queue_arguments for queue in settings["task_queues"]] == [{"x-queue-type": "quorum"}] * len(QUEUES)
    assert settings["task_create_missing_queue_type"] == "quorum"


def test_each_task_is_routed_to_a_consumed_queue() -> None:
    """A task in a queue without a consumer never runs."""
    from tasks.app import app  # noqa: PLC0415 - it reads the environment

    app.loader.import_default_modules()
    payready_tasks = {
        name
        for name in app.tasks
        if name.split(".")[0] in ("payments", "balances", "outcomes", "quarantine", "webhooks")
    }
    routes = SETTINGS["task_routes"]
    assert set(routes) == payready_tasks
    assert {route["queue"] for route in routes.values()} == set(QUEUES)


def test_beat_sends_existing_tasks_that_expire() -> None:
    """A late message expires, because the next one does the same work."""
    for entry in SETTINGS["beat_schedule"].values():
        assert entry["task"] in SETTINGS["task_routes"]
        seconds = ScheduleEntry(**entry, name="x").schedule.seconds
        assert seconds == {"webhooks.check_subscription": 60, "quarantine.prune": 600}.get(entry["task"], 1)
        assert entry["options"]["expires"] <= max(10, seconds / 2)


@pytest.mark.parametrize("key", ["task_acks_late", "task_reject_on_worker_lost"])
def test_message_survives_the_loss_of_its_worker(key: str) -> None:
    """A worker acknowledges after the task; the broker requeues when the worker dies."""
    assert SETTINGS[key] is True
