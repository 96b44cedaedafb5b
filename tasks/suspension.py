"""Suspend a Celery task, and resume it later from any process.

A waiting task would block a thread. Instead the task stores its *continuation* with its payment, and raises `Ignore`:
the worker acknowledges the message, stores no result, sends no callback, and Flower still shows the task as started.
`assign_task_ids_and_make_continuation` makes the continuation, which is what Celery needs to finish the task. When the
outcome is known, any process resumes the task (`resume_with_result`, `resume_with_error`). This repeats the last steps
of Celery's tracer: send the `link` callbacks and the rest of the chain, store the result, count the task in its chord,
call the errbacks, and publish the task event.

The continuation is plain JSON with a version. It contains the task ids of everything that it will send. An outcome that
is delivered twice (after a crash) therefore sends callbacks with the same ids twice, and a receiver can detect that.
Celery handles the rest of a second delivery: it never overwrites SUCCESS, and counts a task once in its chord.

What is used of Celery: `Task.request`, `Signature.apply_async`, `group`, the event dispatcher and kombu's JSON; the
backend methods `mark_as_done` and `mark_as_failure`, on which custom backends build; and two private names,
`Task.request_stack` and `celery._state._task_stack`. A task on both stacks is the current task, so everything that is
sent becomes its child, with its root id, as if the task had not been suspended.

Celery's tracer itself is not used: if the broker is unavailable for a moment, the tracer fails the task. Here the
outcome must stay undelivered instead. `tests/suspension` compares each canvas primitive with the result of Celery's
tracer for a task that is not suspended.
"""

import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from celery import Celery, Task, group
from celery._state import _task_stack
from celery.app.task import Context
from celery.canvas import Signature
from celery.states import FAILURE, SUCCESS
from celery.utils import uuid
from celery.utils.saferepr import saferepr
from kombu.utils import json as kombu_json

from tasks import result_store, tracing
from tasks.callback_checks import raise_invalid_callbacks
from tasks.event_publisher import EventPublisher
from tasks.result_store import TaskResult
from worker.correlation.redis_client import RedisCommand
from worker.rules.callbacks import CALLBACK_FIELDS

VERSION = 1
WAITING = "WAITING"
"""State in the result of a suspended task."""

_SAVED_FIELDS = (
    "id",
    "task",
    "root_id",
    "parent_id",
    "group",
    "group_index",
    "chord",
    "chain",
    "callbacks",
    "errbacks",
    "ignore_result",
    "reply_to",
    "stamps",
    "stamped_headers",
    "hostname",
)
"""Saved fields of a task's request: all that determine where its result goes."""
_NESTED_SIGNATURES = {"group": ("tasks",), "chain": ("tasks",), "chord": ("header", "body")}
"""Arguments of Celery's canvas primitives that are signatures."""


class UnsupportedContinuationVersion(Exception):
    """A later release saved the continuation, so this release cannot resume it."""


def assign_task_ids_and_make_continuation(request: Context) -> dict[str, Any]:
    """Return the continuation of the running task, from which any process can resume it.

    Every task, group and chord that it will send gets an id, also in `request` itself.

    Raises:
        InvalidJob: a callback can never be sent.
    """
    raise_invalid_callbacks(request)
    saved = {name: value for name in _SAVED_FIELDS if (value := getattr(request, name, None)) is not None}
    for name in CALLBACK_FIELDS:
        _assign_task_ids(saved.get(name))
    trace = tracing.trace_context()
    saved["priority"] = (request.delivery_info or {}).get("priority")
    continuation = {"version": VERSION, **saved, "suspended_at": time.time(), **({"trace": trace} if trace else {})}
    # Arguments may have types that JSON lacks, such as dates: kombu has an encoding for them.
    return dict(json.loads(kombu_json.dumps(continuation)))


def _assign_task_ids(signatures: Any) -> None:
    """Assign an id to every task, group and chord among the signatures without one. Their arguments are unchanged."""
    for signature in [signatures] if isinstance(signatures, dict) else signatures or ():
        kind, options = signature.get("subtask_type"), signature.setdefault("options", {})
        if kind != "chain":  # a chain has the id of its last task
            options.setdefault("task_id", uuid())
        for part in _NESTED_SIGNATURES.get(str(kind), ()):
            _assign_task_ids(signature["kwargs"].get(part))
        for callbacks in ("link", "link_error"):
            _assign_task_ids(options.get(callbacks))


def store_waiting_state_or_return_commands(app: Celery, waiting: Mapping[str, Any]) -> list[RedisCommand]:
    """Store the state `WAITING` as the result of suspended tasks, with the given details by task id.

    If the results are in the Redis of the correlation store, return the commands that store them there instead.
    """
    results = [TaskResult(task_id=task_id, state=WAITING, value=details) for task_id, details in waiting.items()]
    if result_store.is_at_correlation_store(app):
        return result_store.commands_to_store(app, results)
    result_store.store_results(app, results)
    return []


def resume_with_result(app: Celery, continuation: dict[str, Any], result: Any) -> None:
    """Finish the suspended task as succeeded with `result`.

    Raises:
        UnsupportedContinuationVersion: a later release saved the continuation.
    """
    with _resumed(app, continuation) as (task, request):
        priority = request.delivery_info["priority"] if app.conf.task_inherit_parent_priority else None
        for callback in _group_link_callbacks(app, request):
            callback.apply_async((result,), priority=priority)
        if request.chain:
            app.signature(request.chain[-1]).apply_async((result,), chain=request.chain[:-1], priority=priority)
        task.backend.mark_as_done(request.id, result, request)
        _publish_succeeded(app, continuation, result)


def is_result_only(continuation: Mapping[str, Any]) -> bool:
    """Return whether the task has no callback and is in no chain, chord or group.

    Its outcome is then only a result, which can be stored in a batch. False if a later release saved the continuation.
    """
    return continuation["version"] <= VERSION and not any(
        continuation.get(name) for name in ("callbacks", "errbacks", "chain", "chord", "group")
    )


@dataclass(frozen=True, kw_only=True)
class FinishedTask:
    """A suspended task with its result, or with the error with which it failed."""

    continuation: dict[str, Any]
    result: Any = None
    error: Exception | None = None


def finish_without_callbacks(app: Celery, finished: Sequence[FinishedTask]) -> None:
    """Store the results of tasks for which `is_result_only` is true, in a batch, and publish their task events."""
    result_store.store_results(
        app, [_task_result(task) for task in finished if not task.continuation.get("ignore_result")]
    )
    for task in finished:
        if task.error:
            _publish_failed(app, task.continuation, task.error)
        else:
            _publish_succeeded(app, task.continuation, task.result)


def finish_skipping_callbacks(app: Celery, finished: FinishedTask) -> None:
    """Finish a task without its callbacks, errbacks and the rest of its chain, one of which cannot be sent.

    Its result is stored, and it counts in its chord.
    """
    skipped = {"callbacks": None, "errbacks": None, "chain": None}
    continuation = {**finished.continuation, **skipped}
    if finished.error:
        resume_with_error(app, continuation, finished.error)
    else:
        resume_with_result(app, continuation, finished.result)


def _task_result(task: FinishedTask) -> TaskResult:
    return TaskResult(
        task_id=task.continuation["id"],
        state=str(FAILURE if task.error else SUCCESS),
        value=task.error or task.result,
        parent_id=task.continuation.get("parent_id"),
        reply_to=task.continuation.get("reply_to"),
    )


def _publish_succeeded(app: Celery, continuation: dict[str, Any], result: Any) -> None:
    text = _truncated_repr(result, app.tasks[continuation["task"]].resultrepr_maxsize)
    _publish_task_event(app, continuation, "task-succeeded", result=text)


def _publish_failed(app: Celery, continuation: dict[str, Any], error: Exception) -> None:
    _publish_task_event(app, continuation, "task-failed", exception=saferepr(error), traceback="")


def _truncated_repr(result: Any, size: int) -> str:
    """Return a result as text of at most `size` characters. Celery's `saferepr` takes twenty times as long."""
    text = repr(result)
    return text if len(text) <= size else f"{text[: size - 3]}..."


def _group_link_callbacks(app: Celery, request: Context) -> Iterator[Signature]:
    """Return the callbacks as Celery sends them: each group by itself, and several others as one group."""
    callbacks = [app.signature(callback) for callback in request.callbacks or ()]
    single = [callback for callback in callbacks if not isinstance(callback, group)]
    yield from (callback for callback in callbacks if isinstance(callback, group))
    if single:
        yield group(single, app=app) if len(callbacks) > 1 else single[0]


def resume_with_error(app: Celery, continuation: dict[str, Any], error: Exception) -> None:
    """Finish the suspended task as failed with `error`.

    Raises:
        UnsupportedContinuationVersion: a later release saved the continuation.
    """
    with _resumed(app, continuation) as (task, request):
        task.backend.mark_as_failure(request.id, error, request=request, store_result=not request.ignore_result)
        _publish_failed(app, continuation, error)


@contextmanager
def _resumed(app: Celery, continuation: dict[str, Any]) -> Iterator[tuple[Task, Context]]:
    """Run the block as the suspended task, with its request."""
    if continuation["version"] > VERSION:
        raise UnsupportedContinuationVersion(
            f"the continuation has version {continuation['version']}, this release supports up to {VERSION}; "
            "upgrade this process"
        )
    saved = kombu_json.loads(json.dumps(continuation))
    task = app.tasks[saved["task"]]
    request = Context(
        {name: saved[name] for name in _SAVED_FIELDS if name in saved},
        called_directly=False,
        delivery_info={"priority": saved.get("priority")},
    )
    _task_stack.push(task)
    task.request_stack.push(request)
    try:
        yield task, request
    finally:
        task.request_stack.pop()
        _task_stack.pop()


def _publish_task_event(app: Celery, continuation: dict[str, Any], event: str, **fields: Any) -> None:
    """Publish an event of the worker that started the task. Its runtime includes the whole wait."""
    waited_s = max(0.0, time.time() - continuation["suspended_at"])
    event_publisher(app).publish_soon_if_enabled(
        event, continuation.get("hostname"), uuid=continuation["id"], runtime=waited_s, **fields
    )


event_publisher = functools.cache(EventPublisher)
