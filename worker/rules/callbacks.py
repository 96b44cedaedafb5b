"""The tasks that are sent when a suspended task ends, as its continuation names them.

They are callbacks (`link`), errbacks (`link_error`), the next task of a chain, and the body of a chord. Only the tasks
that payready sends itself are read: what these send in turn is sent by the worker that runs them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

CallbackKind = Literal["link", "link_error", "chain", "chord"]
_KINDS: Mapping[CallbackKind, str] = {
    "link": "callbacks",
    "link_error": "errbacks",
    "chain": "chain",
    "chord": "chord",
}
"""Each kind, with the field of the continuation that has its signatures."""
CALLBACK_FIELDS = tuple(_KINDS.values())
"""Fields of a continuation, and of a task's request, that have signatures."""
_DESTINATION_OPTIONS = ("queue", "exchange", "routing_key")
"""Options that a group, chain or chord passes to its tasks. They overrule the tasks' own."""


@dataclass(frozen=True, kw_only=True)
class Callback:
    """A task that is sent when the suspended task ends."""

    kind: CallbackKind
    task: str
    """Name of the task."""
    task_id: str | None
    queue: str | None
    """Queue, or exchange and routing key with a slash between them. None if the sender names none."""


@dataclass(frozen=True, kw_only=True)
class SentSignature:
    """A task's signature, with the options that it is sent with."""

    kind: CallbackKind
    task: str
    options: Mapping[str, Any]


def callbacks_of(
    continuation: Mapping[str, Any], *, task_queues: Mapping[str, str], default_queue: str | None = None
) -> list[Callback]:
    """Return the tasks that are sent when the suspended task ends.

    Of those that name no queue, payready's own go to `task_queues`, and all others to the `default_queue`.
    """
    return [
        Callback(
            kind=signature.kind,
            task=signature.task,
            task_id=signature.options.get("task_id"),
            queue=_named_queue(signature.options) or task_queues.get(signature.task, default_queue),
        )
        for signature in sent_signatures(continuation)
    ]


def _named_queue(options: Mapping[str, Any]) -> str | None:
    """Return the queue that the options name. Celery ignores an exchange without a routing key, and the reverse."""
    if options.get("queue"):
        return str(options["queue"])
    if options.get("exchange") and options.get("routing_key"):
        return f"{options['exchange']}/{options['routing_key']}"
    return None


def sent_signatures(continuation: Mapping[str, Any]) -> Iterator[SentSignature]:
    """Yield the signatures of the tasks that are sent when the suspended task ends."""
    for kind, field in _KINDS.items():
        signatures = continuation.get(field) or ()
        if kind == "chain":
            signatures = signatures[-1:]  # Celery stores the rest of a chain in reverse
        for signature in [signatures] if isinstance(signatures, Mapping) else signatures:
            yield from _sent_tasks(kind, signature, {})


def _sent_tasks(
    kind: CallbackKind, signature: Mapping[str, Any], inherited: Mapping[str, Any]
) -> Iterator[SentSignature]:
    """Yield the tasks of a signature that are sent at once: all of a group or chord's header, the first of a chain."""
    options = {**(signature.get("options") or {}), **inherited}
    parts = _parts_sent_at_once(signature)
    if parts is None:
        yield SentSignature(kind=kind, task=str(signature.get("task")), options=options)
        return
    destination = {name: options[name] for name in _DESTINATION_OPTIONS if options.get(name)}
    for part in parts:
        yield from _sent_tasks(kind, part, destination)


def _parts_sent_at_once(signature: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """Return the parts of a group, chain or chord that are sent at once. None for a task."""
    arguments = signature.get("kwargs") or {}
    match signature.get("subtask_type"):
        case "group":
            return _as_list(arguments.get("tasks"))
        case "chain":
            return _as_list(arguments.get("tasks"))[:1]
        case "chord":
            return _as_list(arguments.get("header"))
        case _:
            return None


def _as_list(signatures: Any) -> list[Mapping[str, Any]]:
    """Return one signature, such as the group of a chord's header, or several as a list."""
    return [signatures] if isinstance(signatures, Mapping) else list(signatures or ())
