"""Leave a Celery task unfinished, and complete it later, from any process.

A task that must wait would hold a thread for as long. Instead it saves what Celery needs to go on after it
(`leave`), and raises `Ignore`: the message is acknowledged, no result is written, no callback is sent, and Flower
goes on showing it as started. When its outcome is known, any process takes that saved *canvas* and does what
Celery's tracer does at the end of a task (`complete`, `fail`): it sends the `link` callbacks and the rest of the
chain, writes the result, counts the task in its chord, calls the errbacks, and tells the event watchers.

The canvas is plain JSON with a version. The task ids of everything it will send are settled when it is saved, so
an outcome that is delivered twice (after a crash) sends callbacks with the same ids twice, and a receiver can tell.

What is used of Celery: `Task.request`, `Signature.apply_async`, `Backend.mark_as_done` and `mark_as_failure`, the event
dispatcher, and (not public) `Task.request_stack` and `celery._state._task_stack`, which make the
completing code run as the completed task, so that children, root and parent ids come out as if it had never left.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery, Task
from celery._state import _task_stack
from celery.app.task import Context
from celery.utils import uuid

VERSION = 1
WAITING = "WAITING"
"""The state that a task's result shows while its task is left."""

_SAVED = (
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
    "stamps",
    "stamped_headers",
    "hostname",
)
"""What is kept of a task's request: all that says where its result goes."""


def leave(request: Context) -> dict[str, Any]:
    """The canvas of the running task: what it takes to complete it later."""
    saved = {name: value for name in _SAVED if (value := getattr(request, name, None)) not in (None, [], {}, False)}
    for name in ("callbacks", "errbacks", "chord", "chain"):
        _settle_ids(saved.get(name))
    priority = (request.delivery_info or {}).get("priority")
    return {"version": VERSION, **saved, **({} if priority is None else {"priority": priority}), "left_at": time.time()}


def _settle_ids(node: Any) -> None:
    """Give an id to every signature in a canvas that has none yet."""
    if isinstance(node, dict):
        if "task" in node and isinstance(node.get("options"), dict):
            node["options"].setdefault("task_id", uuid())
        for part in node.values():
            _settle_ids(part)
    elif isinstance(node, list | tuple):
        for part in node:
            _settle_ids(part)


def complete(app: Celery, canvas: dict[str, Any], result: Any) -> None:
    """End the task that left this canvas as succeeded with `result`."""
    with _resumed(app, canvas) as (task, request):
        priority = canvas.get("priority") if app.conf.task_inherit_parent_priority else None
        onward = {"parent_id": request.id, "root_id": request.root_id or request.id, "priority": priority}
        for callback in request.callbacks or ():
            app.signature(callback).apply_async((result,), **onward)
        if request.chain:
            app.signature(request.chain[-1]).apply_async((result,), chain=request.chain[:-1], **onward)
        task.backend.mark_as_done(request.id, result, request)
    _tell_watchers(app, canvas, "task-succeeded", result=repr(result))


def fail(app: Celery, canvas: dict[str, Any], error: Exception) -> None:
    """End the task that left this canvas as failed with `error`."""
    with _resumed(app, canvas) as (task, request):
        task.backend.mark_as_failure(request.id, error, request=request, store_result=not request.ignore_result)
    _tell_watchers(app, canvas, "task-failed", exception=repr(error), traceback="")


@contextmanager
def _resumed(app: Celery, canvas: dict[str, Any]) -> Iterator[tuple[Task, Context]]:
    """Run the block as the task that left, with its request."""
    task = app.tasks[canvas["task"]]
    request = Context(
        {name: canvas[name] for name in _SAVED if name in canvas},
        called_directly=False,
        delivery_info={"priority": canvas.get("priority"), "is_eager": False},
    )
    _task_stack.push(task)
    task.request_stack.push(request)
    try:
        yield task, request
    finally:
        task.request_stack.pop()
        _task_stack.pop()


def _tell_watchers(app: Celery, canvas: dict[str, Any], event: str, **fields: Any) -> None:
    """Tell Flower and its like, in the name of the worker that began the task; the runtime is the whole wait."""
    if app.conf.worker_send_task_events:
        with app.events.default_dispatcher(hostname=canvas.get("hostname")) as dispatcher:
            dispatcher.send(event, uuid=canvas["id"], runtime=max(0.0, time.time() - canvas["left_at"]), **fields)
