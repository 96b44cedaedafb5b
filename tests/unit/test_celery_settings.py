"""Celery configuration: every key and option is one that Celery knows, because Celery ignores misspelt keys."""

import inspect

import pytest
from celery.app.defaults import NAMESPACES, flatten
from celery.backends import redis
from celery.beat import ScheduleEntry
from kombu.transport.redis import Channel
from kombu.utils.url import parse_url

from config.celery_config import QUEUES, celery_settings
from config.settings import Settings
from tasks.tracing import UNTRACED_TASKS

KNOWN = dict(flatten(NAMESPACES))
READ_BUT_NOT_LISTED = {"redis_backend_health_check_interval"}
"""Keys that Celery reads and documents, but that are missing in its list of defaults."""
SETTINGS = celery_settings(Settings())


def test_every_key_is_known_to_celery() -> None:
    """Celery's defaults list the key, or a line of Celery reads it."""
    assert set(SETTINGS) - set(KNOWN) <= READ_BUT_NOT_LISTED
    for key in READ_BUT_NOT_LISTED:
        assert f"'{key}'" in inspect.getsource(redis)


def test_misspelt_key_is_unknown_to_celery() -> None:
    assert "task_ack_late" not in KNOWN
    assert "task_acks_late" in KNOWN


def test_every_broker_option_is_known_to_the_transport() -> None:
    options = SETTINGS["broker_transport_options"]
    assert options
    assert set(options) - set(Channel.from_transport_options) == set()


def test_kombu_restores_no_messages_of_other_apps() -> None:
    """It restores unacknowledged messages at the start of a worker, although it fetches none."""
    for key in ("unacked_key", "unacked_index_key", "unacked_mutex_key"):
        assert SETTINGS["broker_transport_options"][key] != getattr(Channel, key)


def test_rabbitmq_has_quorum_queues_and_publisher_confirms() -> None:
    """Queues of callbacks are quorum queues too, because the first process that uses a queue declares it."""
    assert parse_url("amqp://b")["transport"] == "amqp"
    settings = celery_settings(Settings(broker_url="amqp://b"))
    assert settings["broker_transport_options"]["confirm_publish"] is True
    assert [queue.queue_arguments for queue in settings["task_queues"]] == [{"x-queue-type": "quorum"}] * len(QUEUES)
    assert settings["task_create_missing_queue_type"] == "quorum"


def test_every_task_is_routed_to_a_queue() -> None:
    """A task on a queue without a consumer would never run."""
    from tasks.app import app  # noqa: PLC0415 - it reads the environment

    app.loader.import_default_modules()
    tasks = {name for name, task in app.tasks.items() if task.__module__.startswith("tasks.")}
    routes = SETTINGS["task_routes"]
    assert set(routes) == tasks
    assert {route["queue"] for route in routes.values()} == set(QUEUES)


def test_beat_schedule_has_known_tasks_that_expire() -> None:
    """A late message expires, because the next one does its work."""
    for entry in SETTINGS["beat_schedule"].values():
        assert entry["task"] in SETTINGS["task_routes"]
        seconds = ScheduleEntry(**entry, name="x").schedule.seconds
        assert seconds == {"webhooks.check_subscription": 60, "quarantine.prune": 600}.get(entry["task"], 1)
        assert entry["options"]["expires"] <= max(10, seconds / 2)


@pytest.mark.parametrize("key", ["task_acks_late", "task_reject_on_worker_lost"])
def test_message_is_acknowledged_after_its_task(key: str) -> None:
    """A message of a killed worker is delivered again."""
    assert SETTINGS[key] is True


def test_maintenance_tasks_have_no_spans() -> None:
    """Most of their runs find nothing to do."""
    maintenance = {task for task, route in SETTINGS["task_routes"].items() if route["queue"] == "maintenance"}
    assert maintenance == UNTRACED_TASKS


def test_callback_queue_is_the_default_queue() -> None:
    """Without it, callbacks that name no queue go to Celery's own default."""
    assert SETTINGS["task_default_queue"] == "celery"
    assert celery_settings(Settings(callback_queue="svc"))["task_default_queue"] == "svc"
