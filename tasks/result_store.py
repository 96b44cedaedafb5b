"""Writes to Celery's result backend: in batches, and without tracebacks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partialmethod
from typing import Any

from celery import Celery
from celery.app.backends import by_url
from celery.app.task import Context
from celery.backends.redis import RedisBackend
from celery.exceptions import ImproperlyConfigured

from config.settings import ConfigurationError, settings
from worker.correlation.redis_client import RedisCommand


class _WithoutTracebacks:
    """A mixin for result backends: an error is stored with its type and message, without the paths of our source."""

    def store_result(
        self, task_id: str, result: Any, state: str, _traceback: Any = None, request: Any = None, **options: Any
    ) -> Any:
        options.pop("traceback", None)
        return super().store_result(task_id, result, state, None, request, **options)  # type: ignore[misc]


def store_no_tracebacks(app: Celery) -> None:
    """Make the app's result backend store no traceback: the results are for the payments service.

    This covers all that Celery stores: failed tasks, their chains, and the bodies of failed chords.

    Raises:
        ConfigurationError: Celery has no such result backend, or cannot use it here.
    """
    backend, url = _find_backend(app)
    # Celery passes the URL only to a backend that it has found by this URL.
    app.backend_cls = type(backend.__name__, (_WithoutTracebacks, backend), {"__init__": partialmethod(_init, url)})


def _init(backend: Any, found_url: str | None, *args: Any, **options: Any) -> None:
    super(type(backend), backend).__init__(*args, **{**options, "url": found_url})


def require_usable_result_backend(app: Celery) -> None:
    """Raise `ConfigurationError` if Celery has no such result backend, or cannot use it here. Nothing connects."""
    _find_backend(app)


def _find_backend(app: Celery) -> tuple[type[Any], str | None]:
    try:
        backend, url = by_url(app.conf.result_backend, app.loader)
    except (ImportError, ImproperlyConfigured):
        raise ConfigurationError(_unusable("names no result backend of Celery")) from None
    try:
        _import_its_packages(app, backend, url)
    except (ImportError, ImproperlyConfigured, ValueError):
        problem = "names a result backend whose Python package is not installed, or has another form"
        raise ConfigurationError(_unusable(problem)) from None
    return backend, url


def _import_its_packages(app: Celery, backend: type[Any], url: str | None) -> None:
    """Raise an error if the address has another form, or a package is missing. Otherwise the first result would."""
    if issubclass(backend, RedisBackend):
        return  # `Settings` has checked the address
    if backend.__name__ == "DatabaseBackend":  # an instance of it connects
        from worker.ledger.engine import import_driver  # noqa: PLC0415 - `beat` has no use for it otherwise

        import_driver(str(url))
    else:
        backend(app=app, url=url)


def _unusable(problem: str) -> str:
    return (
        f"PAYREADY_RESULT_BACKEND_URL {problem}; write redis://user:password@host:6379/0, "
        "or leave it unset for PAYREADY_REDIS_URL"
    )


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The result of a task to store."""

    task_id: str
    state: str
    value: Any
    parent_id: str | None = None
    reply_to: str | None = None
    """Queue of the result, for the backend `rpc`."""


def store_results(app: Celery, results: Sequence[TaskResult]) -> None:
    """Store results. With the Redis backend this takes one round trip.

    Celery's own `store_result` reads each result first, and never overwrites SUCCESS. Here the caller must ensure this.
    """
    backend = app.backend
    if not isinstance(backend, RedisBackend):
        for result in results:
            backend.store_result(result.task_id, result.value, result.state, request=_result_request(result))
        return
    with backend.client.pipeline(transaction=False) as pipeline:
        for command in commands_to_store(app, results):
            pipeline.execute_command(*command)
        pipeline.execute()


def is_at_correlation_store(app: Celery) -> bool:
    """Return whether the results are stored in the Redis of the correlation store."""
    chosen = settings()
    return isinstance(app.backend, RedisBackend) and chosen.effective_result_backend_url == chosen.redis_url


def commands_to_store(app: Celery, results: Sequence[TaskResult]) -> list[RedisCommand]:
    """Return the commands that store results in the Redis backend, as `store_results` does."""
    commands: list[RedisCommand] = []
    backend = app.backend
    expiry = ("EX", backend.expires) if backend.expires else ()
    for result in results:
        encoded = backend.encode_result(result.value, result.state)
        meta = backend._get_result_meta(encoded, result.state, None, _result_request(result))  # noqa: SLF001 - see `store_results`
        key, value = backend.get_key_for_task(result.task_id), backend.encode({**meta, "task_id": result.task_id})
        commands += [("SET", key, value, *expiry), ("PUBLISH", key, value)]
    return commands


def _result_request(result: TaskResult) -> Context:
    return Context(id=result.task_id, parent_id=result.parent_id, reply_to=result.reply_to, children=[])
