"""Leave a Celery task unfinished, and complete it later, from any process.

A task that must wait would hold a thread for as long. Instead it saves what Celery needs to go on after it
(`leave`), and raises `Ignore`: the message is acknowledged, no result is written, no callback is sent, and Flower
goes on showing it as started. When its outcome is known, any process takes that saved *continuation* and does what
Celery's tracer does at the end of a task (`complete`, `fail`): it sends the `link` callbacks and the rest of the
chain, writes the result, counts the task in its chord, calls the errbacks, and tells the event watchers.

The continuation is plain JSON with a version. The task ids of everything it will send are settled when it is saved, so
an outcome that is delivered twice (after a crash) sends callbacks with the same ids twice, and a receiver can tell.
Celery itself sees to the rest of a second delivery: a result that says SUCCESS stays as it is, and a task counts
once in its chord.

What is used of Celery: `Task.request`, `Signature.apply_async`, `group`, the event dispatcher, kombu's JSON; the two
backend methods `mark_as_done` and `mark_as_failure`, which are what custom backends build on; and, not public,
`Task.request_stack` and `celery._state._task_stack`. A task that is on both stacks is the current one, so that what
is sent becomes its child, with its root, as if it had never left. Celery's tracer cannot be asked to
do all this: it turns a broker that is away for a moment into the task's failure, while here the outcome must stay due.
`tests/suspension` compares the outcome of every primitive with what the tracer makes of a task that never waits.
"""

import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from tasks.event_publisher import EventPublisher
from tasks.result_store import TaskResult

VERSION = 1
WAITING = "WAITING"
"""The state that a task's result shows while its task is left."""

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
"""What is kept of a task's request: all that says where its result goes."""
_NESTED_SIGNATURES = {"group": ("tasks",), "chain": ("tasks",), "chord": ("header", "body")}
"""The arguments of a canvas primitive that are signatures themselves."""


class UnsupportedContinuationVersion(Exception):
    """A continuation was saved by a later release than this one, which cannot complete it."""


def suspend(request: Context) -> dict[str, Any]:
    """The continuation of the running task: what it takes to complete it later."""
    saved = {name: value for name in _SAVED_FIELDS if (value := getattr(request, name, None)) is not None}
    for name in ("callbacks", "errbacks", "chord", "chain"):
        _assign_task_ids(saved.get(name))
    trace = tracing.trace_context()
    saved["priority"] = (request.delivery_info or {}).get("priority")
    continuation = {"version": VERSION, **saved, "suspended_at": time.time(), **({"trace": trace} if trace else {})}
    # Arguments may hold what JSON has no word for, as dates: kombu writes those in its own way.
    return dict(json.loads(kombu_json.dumps(continuation)))


def _assign_task_ids(signatures: Any) -> None:
    """Give an id to every task, group and chord among the signatures that has none; what they take as data is left."""
    for signature in [signatures] if isinstance(signatures, dict) else signatures or ():
        kind, options = signature.get("subtask_type"), signature.setdefault("options", {})
        if kind != "chain":  # whose id is that of its last task
            options.setdefault("task_id", uuid())
        for part in _NESTED_SIGNATURES.get(str(kind), ()):
            _assign_task_ids(signature["kwargs"].get(part))
        for callbacks in ("link", "link_error"):
            _assign_task_ids(options.get(callbacks))


def store_waiting_state(app: Celery, waiting: Mapping[str, Any]) -> None:
    """Let the results of tasks that are left show that they wait, and for what."""
    result_store.store_results(app, [TaskResult(task_id, WAITING, what) for task_id, what in waiting.items()])


def resume_with_result(app: Celery, continuation: dict[str, Any], result: Any) -> None:
    """End the task that left this continuation as succeeded with `result`.

    Raises:
        UnknownCanvas: a later release saved it.
    """
    with _resumed(app, continuation) as (task, request):
        priority = request.delivery_info["priority"] if app.conf.task_inherit_parent_priority else None
        for callback in _callbacks(app, request):
            callback.apply_async((result,), priority=priority)
        if request.chain:
            app.signature(request.chain[-1]).apply_async((result,), chain=request.chain[:-1], priority=priority)
        task.backend.mark_as_done(request.id, result, request)
        _publish_task_event(
            app, continuation, "task-succeeded", result=_truncated_repr(result, task.resultrepr_maxsize)
        )


def has_no_callbacks(continuation: Mapping[str, Any]) -> bool:
    """Whether nothing follows the task: its outcome is a result, or nothing at all, and can be told with others'."""
    return continuation["version"] <= VERSION and not any(
        continuation.get(name) for name in ("callbacks", "errbacks", "chain", "chord", "group")
    )


def resume_without_callbacks(app: Celery, ended: Sequence[tuple[dict[str, Any], Any]]) -> None:
    """End plain tasks together, each as succeeded with its result, or as failed with its exception."""
    wanted = [(continuation, end) for continuation, end in ended if not continuation.get("ignore_result")]
    ends = [TaskResult(c["id"], _celery_state(end), end, c.get("parent_id"), c.get("reply_to")) for c, end in wanted]
    result_store.store_results(app, ends)
    for continuation, end in ended:
        if isinstance(end, Exception):
            _publish_task_event(app, continuation, "task-failed", exception=saferepr(end), traceback="")
        else:
            shown = _truncated_repr(end, app.tasks[continuation["task"]].resultrepr_maxsize)
            _publish_task_event(app, continuation, "task-succeeded", result=shown)


def _truncated_repr(result: Any, size: int) -> str:
    """A result as text of so many characters at most. Celery's own `saferepr` takes twenty times as long."""
    text = repr(result)
    return text if len(text) <= size else f"{text[: size - 3]}..."


def _celery_state(end: Any) -> str:
    return str(FAILURE if isinstance(end, Exception) else SUCCESS)


def _callbacks(app: Celery, request: Context) -> Iterator[Signature]:
    """The callbacks as Celery sends them: several of them as one group, but those that are groups by themselves."""
    callbacks = [app.signature(callback) for callback in request.callbacks or ()]
    single = [callback for callback in callbacks if not isinstance(callback, group)]
    yield from (callback for callback in callbacks if isinstance(callback, group))
    if single:
        yield group(single, app=app) if len(callbacks) > 1 else single[0]


def resume_with_error(app: Celery, continuation: dict[str, Any], error: Exception) -> None:
    """End the task that left this continuation as failed with `error`.

    Raises:
        UnknownCanvas: a later release saved it.
    """
    with _resumed(app, continuation) as (task, request):
        task.backend.mark_as_failure(request.id, error, request=request, store_result=not request.ignore_result)
        _publish_task_event(app, continuation, "task-failed", exception=saferepr(error), traceback="")


@contextmanager
def _resumed(app: Celery, continuation: dict[str, Any]) -> Iterator[tuple[Task, Context]]:
    """Run the block as the task that left, with its request."""
    if continuation["version"] > VERSION:
        raise UnsupportedContinuationVersion(
            f"the continuation has version {continuation['version']}, and this release reads up to {VERSION}"
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
    """Tell Flower and its like, in the name of the worker that began the task; the runtime is the whole wait."""
    waited_s = max(0.0, time.time() - continuation["suspended_at"])
    event_publisher(app).publish(
        event, continuation.get("hostname"), uuid=continuation["id"], runtime=waited_s, **fields
    )


event_publisher = functools.cache(EventPublisher)
