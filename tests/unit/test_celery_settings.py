"""Celery configuration: every key and option is one that Celery knows, because Celery ignores misspelt keys."""

import inspect

import pytest
from celery import Celery
from celery.app.defaults import NAMESPACES, flatten
from celery.backends import redis
from celery.beat import ScheduleEntry
from kombu import Exchange, Queue
from kombu.transport.redis import Channel
from kombu.utils.url import parse_url

from config.celery_config import QUEUES, celery_settings
from config.settings import Settings
from tasks import idle_consumer
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


def test_instance_prefixes_every_name_on_the_broker() -> None:
    """Without an instance the names are Celery's own."""
    names = ("control_exchange", "event_exchange", "event_queue_prefix")
    assert [SETTINGS[name] for name in names] == [KNOWN[name].default for name in names]
    live = celery_settings(Settings(instance="live"))
    assert [live[name] for name in names] == [f"live.{KNOWN[name].default}" for name in names]
    assert [queue.name for queue in live["task_queues"]] == [f"live.{name}" for name in QUEUES]
    assert {route["queue"] for route in live["task_routes"].values()} == {f"live.{name}" for name in QUEUES}
    keys = ("unacked_key", "unacked_index_key", "unacked_mutex_key")
    assert all(live["broker_transport_options"][key].startswith("live.payready-unacked") for key in keys)


def test_worker_selects_the_queues_of_its_instance_by_their_names_in_the_procfile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name in a callback's options is not changed: it may be another deployment's."""
    monkeypatch.setattr(idle_consumer, "settings", lambda: Settings(instance="live"))
    app = Celery("payready", amqp="tasks.idle_consumer:DeclaringAMQP", set_as_current=False)
    app.conf.update(celery_settings(Settings(instance="live")))
    app.amqp.queues.select(None)
    app.amqp.queues.deselect(None)
    assert list(app.amqp.queues.consume_from) == [f"live.{name}" for name in QUEUES]
    app.amqp.queues.select(["payments", "balances", "polls"])
    app.amqp.queues.deselect(["polls", "other"])
    assert list(app.amqp.queues.consume_from) == ["live.payments", "live.balances"]
    app.amqp.queues.deselect("balances")  # as the remote control `cancel_consumer` does
    assert list(app.amqp.queues.consume_from) == ["live.payments"]
    assert app.amqp.router.route({"queue": "payments"}, "payments.initiate")["queue"].name == "payments"
    assert app.amqp.router.route({}, "payments.initiate")["queue"].name == "live.payments"
    app.close()


def test_message_for_the_default_exchange_of_celery_reaches_no_queue_of_payready(valkey_url: str) -> None:
    """Another app may publish to it. A queue that is bound to it would get a copy."""
    app = Celery("payready", broker=valkey_url, set_as_current=False)
    app.conf.update(celery_settings(Settings(redis_url=valkey_url)))
    with app.connection_for_write() as connection, connection.default_channel.client as redis:
        redis.flushdb()
        for queue in app.amqp.queues.values():
            queue(connection.default_channel).declare()
        producer = connection.Producer()
        producer.publish(
            {}, exchange="celery", routing_key="celery", declare=[Queue("celery", Exchange("celery"), "celery")]
        )
        assert [redis.llen(name) for name in ("celery", *QUEUES)] == [1, *[0] * len(QUEUES)]
    app.close()
