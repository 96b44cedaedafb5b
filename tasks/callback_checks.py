"""Checks of the callbacks of a job, before its task is suspended.

Celery checks the options of a callback when it sends it. By then the payment is resolved, and its task could never end.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from celery.app.task import Context
from celery.canvas import Signature
from kombu import compression, serialization

from worker.errors import InvalidJob
from worker.rules.callbacks import CALLBACK_FIELDS, sent_signatures

MAX_SECONDS = 1_000_000_000
"""Limit of a countdown: later times may be beyond the last day that Python knows."""
MAX_PRIORITY = 255
"""AMQP sends a priority as one byte."""
MAX_REPORTED_NAME_CHARS = 64


@dataclass(frozen=True, kw_only=True)
class OptionRule:
    """What an option must be. An option that is missing or None is not checked."""

    is_valid: Callable[[Any], bool]
    text: str


def raise_invalid_callbacks(request: Context) -> None:
    """Check that the callbacks of a running task can be sent.

    If not, errbacks that cannot be sent, and fields of a wrong form, are removed from the request: Celery ends the task
    of a refused job by itself, and must not fail at them.

    Raises:
        InvalidJob: a callback is no signature, or cannot be sent with its options.
    """
    problems = [problem for field in CALLBACK_FIELDS for problem in _problems(field, getattr(request, field, None))]
    if not problems:
        return
    for field in CALLBACK_FIELDS:
        if _form_problem(field, getattr(request, field, None)):
            setattr(request, field, None)
    request.errbacks = [errback for errback in request.errbacks or () if not any(_problems("errbacks", [errback]))]
    raise InvalidJob("; ".join(dict.fromkeys(problems)))


def _problems(field: str, signatures: Any) -> Iterator[str]:
    """Yield what is wrong with the signatures in a field of the request."""
    if not signatures:
        return
    if form_problem := _form_problem(field, signatures):
        yield form_problem
        return
    for signature in sent_signatures({field: signatures}):
        name = signature.task[:MAX_REPORTED_NAME_CHARS]
        for option, rule in _OPTION_RULES.items():
            value = signature.options.get(option)
            if value is not None and not rule.is_valid(value):
                yield f'callback "{name}" ({signature.kind}): the option {option} must {rule.text}'


def _form_problem(field: str, signatures: Any) -> str | None:
    """Return what is wrong with the form of a field of the request: it is one signature, or a list of them."""
    if not signatures:
        return None
    is_chord = field == "chord"
    if not isinstance(signatures, Mapping if is_chord else list | tuple):
        return f"callbacks: the field {field} of the message must be a {'signature' if is_chord else 'list'}"
    if any(_is_malformed(signature) for signature in ([signatures] if is_chord else signatures)):
        return f"callbacks: each callback in the field {field} of the message must be a signature of Celery"
    return None


def _is_malformed(signature: Any) -> bool:
    """Whether a value is no signature, or contains one that is none."""
    if not isinstance(signature, Mapping) or not isinstance(signature.get("task"), str) or not signature["task"]:
        return True
    types = {"options": Mapping, "args": list | tuple, "kwargs": Mapping}
    if any(not isinstance(value, types[name]) for name in types if (value := signature.get(name)) is not None):
        return True
    kind = signature.get("subtask_type")
    if kind is not None and (not isinstance(kind, str) or kind not in Signature.TYPES):
        return True
    arguments, options = signature.get("kwargs") or {}, signature.get("options") or {}
    parts = [arguments.get(name) for name in _PARTS.get(str(kind), ())]
    if any(part is None for part in parts):
        return True
    parts += [options.get(name) for name in ("link", "link_error")]
    return any(_is_malformed_part(part) for part in parts if part is not None)


def _is_malformed_part(part: Any) -> bool:
    if isinstance(part, list | tuple):
        return any(_is_malformed(signature) for signature in part)
    return _is_malformed(part)


_PARTS: Mapping[str, tuple[str, ...]] = {"group": ("tasks",), "chain": ("tasks",), "chord": ("header", "body")}
"""Arguments of Celery's canvas primitives that are signatures."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and -MAX_SECONDS <= value <= MAX_SECONDS


def _is_time(value: Any) -> bool:
    if isinstance(value, datetime | date):
        return True
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_serializer(value: Any) -> bool:
    try:
        serialization.dumps([], serializer=value)
    except Exception:  # noqa: BLE001 - a serializer whose package is missing raises an error of its own
        return False
    return True


def _is_compression(value: Any) -> bool:
    try:
        compression.get_encoder(value)
    except (KeyError, TypeError, AttributeError):
        return False
    return True


_IN_PROCESS = OptionRule(is_valid=lambda _: False, text="not be set: it is an object of the sender's process")
_TEXT = OptionRule(is_valid=_is_text, text="be a text")
_MAPPING = OptionRule(is_valid=_is_mapping, text="be a mapping")
_SECONDS = f"a number of seconds of at most {MAX_SECONDS}"
_OPTION_RULES: Mapping[str, OptionRule] = {
    "queue": _TEXT,
    "exchange": _TEXT,
    "routing_key": _TEXT,
    "task_id": _TEXT,
    "countdown": OptionRule(is_valid=_is_seconds, text=f"be {_SECONDS}"),
    "eta": OptionRule(is_valid=_is_time, text="be a time in ISO 8601"),
    "expires": OptionRule(
        is_valid=lambda value: _is_seconds(value) or _is_time(value), text=f"be {_SECONDS}, or a time in ISO 8601"
    ),
    "serializer": OptionRule(is_valid=_is_serializer, text="be a serializer that payready has, such as json"),
    "compression": OptionRule(is_valid=_is_compression, text="be a compression that payready has, such as gzip"),
    "priority": OptionRule(
        is_valid=lambda value: isinstance(value, int) and 0 <= value <= MAX_PRIORITY,
        text=f"be a whole number from 0 to {MAX_PRIORITY}",
    ),
    "delivery_mode": OptionRule(
        is_valid=lambda value: value in (1, 2, "transient", "persistent"), text="be transient or persistent"
    ),
    "headers": _MAPPING,
    "retry_policy": _MAPPING,
    **dict.fromkeys(("producer", "publisher", "connection", "router", "result_cls", "declare"), _IN_PROCESS),
}
"""Options with which a callback can never be sent, or never run, unless they follow the rule."""
