"""The Celery application: `celery -A tasks.app worker`."""

import functools
import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click
from celery import Celery, Task
from celery.signals import beat_init, import_modules, setup_logging, task_postrun, task_prerun, worker_ready

from config.celery_config import celery_settings
from config.garbage_collection import collect_and_freeze_objects, raise_gc_thresholds
from config.log_config import configure_logging, log_start, replace_log_context
from config.role_settings import Role, require_settings_of_role
from config.settings import ConfigurationError, Settings, settings
from tasks import result_store, tracing


def _set_up_process_and_make_app() -> Celery:
    """Set up the garbage collector and tracing. Exit if the configuration is wrong."""
    raise_gc_thresholds()
    try:
        chosen = settings()
        app = _make_app(chosen)
        if chosen.tracing_enabled:
            tracing.enable()
    except ConfigurationError as error:
        sys.exit(f"payready cannot start: {error}")
    return app


def _make_app(settings: Settings) -> Celery:
    app = Celery(
        "payready",
        amqp="tasks.idle_consumer:DeclaringAMQP",
        events="tasks.event_dispatcher:EventLoopEvents",
        include=[
            "tasks.payment_tasks",
            "tasks.balance_tasks",
            "tasks.maintenance_tasks",
            "tasks.revocation",
            "tasks.monitoring",
        ],
    )
    app.conf.update(celery_settings(settings))
    app.steps["consumer"].add("tasks.consumer_step:QueueConsumers")
    result_store.store_no_tracebacks(app)
    return app


@import_modules.connect  # all of Celery's roles send it before they connect
def _require_settings_of_role(**_: Any) -> None:
    role = _ROLES_OF_COMMANDS.get(_command_name())
    if role is not None:
        try:
            require_settings_of_role(settings(), role)
        except ConfigurationError as error:
            sys.exit(f"payready cannot start: {error}")


_ROLES_OF_COMMANDS: Mapping[str | None, Role] = {"worker": "worker", "beat": "beat", "flower": "flower"}
"""The command `worker` also runs the role `refresh`, which needs the same settings."""


@import_modules.connect  # Flower does not send `setup_logging`
@setup_logging.connect
def _configure_logging(**_: Any) -> None:
    configure_logging(settings())


@worker_ready.connect
@beat_init.connect
def _freeze_gc_after_start(**_: Any) -> None:
    collect_and_freeze_objects()


@worker_ready.connect
def _log_worker_start(sender: Any, **_: Any) -> None:
    queues = {queue.name for queue in sender.task_consumer.queues}
    log_start(settings(), "refresh" if f"{settings().name_prefix}refreshes" in queues else "worker")


@beat_init.connect
def _log_beat_start(**_: Any) -> None:
    log_start(settings(), "beat")


@import_modules.connect  # Flower has no signal of its own
def _log_flower_start(**_: Any) -> None:
    if _command_name() == "flower":
        log_start(settings(), "flower")


@import_modules.connect
def _include_only_needed_modules(**_: Any) -> None:
    """Save memory in `beat`, which sends tasks by name, and in Flower, which learns of them by events."""
    command = _command_name()
    if command == "beat":
        app.conf.include = ["tasks.monitoring"] if settings().metrics_port else []  # metrics need the ledger
    elif command == "flower":
        app.conf.include = []


def _command_name() -> str | None:
    """Return the name of Celery's command that imports the tasks, or None if none does: other roles import them."""
    command = click.get_current_context(silent=True)
    return command.info_name if command is not None else None


@task_prerun.connect
def _set_task_log_context(task_id: str, task: Task, args: Sequence[Any], kwargs: Mapping[str, Any], **_: Any) -> None:
    arguments = dict(zip(_parameter_names(task.name), args, strict=False))
    job = arguments.pop("job", None)
    replace_log_context({**(job if isinstance(job, Mapping) else {}), **arguments, **kwargs, "task_id": task_id})


@functools.cache
def _parameter_names(task_name: str) -> tuple[str, ...]:
    return tuple(inspect.signature(app.tasks[task_name].run).parameters)


@task_postrun.connect
def _clear_task_log_context(**_: Any) -> None:
    replace_log_context({})


app = _set_up_process_and_make_app()
