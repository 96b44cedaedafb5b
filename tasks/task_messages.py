"""Read task messages as the broker stored them, and reject what is no task message.

Everything that payready or Celery reads from a message is validated here first. The queue is the one that the message
was fetched from, never the one that its sender wrote into it. Celery's message protocol has two versions: both are
documented, and both become a message of version 2.
"""

import binascii
import bz2
import json
import lzma
import zlib
from base64 import b64decode
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import time
from typing import Annotated, Any

from celery.app.task import Context
from celery.utils.time import maybe_iso8601
from kombu.message import Message
from kombu.serialization import loads
from kombu.utils import json as kombu_json
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from worker.rules.unhandled_messages import DeadLetterReason

JSON_CONTENT = "application/json"
MAX_ID_CHARS = 255
"""Maximum length of an id of a task, also in the database."""
MAX_BODY_BYTES = 16 * 1024 * 1024
"""Maximum size of a decompressed body."""
_DECOMPRESSORS: Mapping[str, Callable[[], Any]] = {
    "application/x-gzip": zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": lzma.LZMADecompressor,
}
"""By the name of the compression in a message, those of kombu that need no further package."""
MAX_NESTING = 200
"""Maximum depth of a message. Python encodes less deep JSON the deeper a function is called."""


@dataclass(frozen=True, kw_only=True)
class FetchedMessage:
    """A message as the broker stored it."""

    tag: Any
    """Identifies the message to its source."""
    deliveries: int
    """How many workers were given the message, including this one."""
    text: bytes
    """JSON with `body`, `content-type`, `headers` and `properties`, as kombu's Redis transport stores messages."""


@dataclass(frozen=True, kw_only=True)
class TaskMessage:
    """A message of a known task, with valid fields."""

    fetched: FetchedMessage
    task_name: str
    task_id: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    embed: Mapping[str, Any]
    """Callbacks, errbacks, chain and chord of the task."""
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]
    queue: str
    received_at: float = field(default_factory=time)
    was_contended: bool = False
    """Whether its account was locked in the previous batch."""

    @property
    def is_plain(self) -> bool:
        """Whether the message has neither an ETA nor an expiry."""
        return not (self.headers.get("eta") or self.headers.get("expires"))

    @property
    def eta(self) -> datetime | None:
        """Time before which the task must not run."""
        return _parse_time(self.headers.get("eta"))

    @property
    def _delivery_info(self) -> dict[str, Any]:
        return {
            "exchange": "",
            "routing_key": self.queue,
            "priority": self.properties.get("priority"),
            "redelivered": self.fetched.deliveries > 1,
        }

    def as_request_context(self, hostname: str) -> Context:
        """Return the request of the task, as Celery makes it."""
        return Context(
            self.headers,
            **self.embed,
            hostname=hostname,
            delivery_info=self._delivery_info,
            reply_to=self.properties.get("reply_to"),
        )

    def as_kombu_message(self, channel: Any, *, is_redelivered: bool = False) -> Message:
        """Return the message for Celery. Celery acknowledges or rejects it through `channel`.

        `is_redelivered`: this worker has given it to Celery before.
        """
        info = self._delivery_info
        return Message(
            body=kombu_json.dumps([self.args, self.kwargs, self.embed]).encode(),
            delivery_tag=self.fetched.tag,
            content_type=JSON_CONTENT,
            content_encoding="utf-8",
            delivery_info={**info, "redelivered": info["redelivered"] or is_redelivered},
            properties=dict(self.properties),
            headers=dict(self.headers),
            accept={JSON_CONTENT},
            channel=channel,
        )


class UnusableMessage(Exception):
    """The message is a dead letter: it cannot be read, or no task of payready has its name."""

    def __init__(
        self, reason: DeadLetterReason, detail: str, *, task_id: str | None = None, task_name: str | None = None
    ) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail
        self.task_id, self.task_name = task_id, task_name


def _parse_time(value: Any) -> datetime | None:
    """Return a time of a message, or None. A time without a zone is UTC, as for Celery."""
    parsed: datetime | None = maybe_iso8601(value) if value else None
    if parsed is None:
        return None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def _check_time(value: str | None) -> str | None:
    try:
        parsed = _parse_time(value)
        if parsed:
            parsed.timestamp()  # year 1 has none in some zones
    except (ValueError, OverflowError):
        raise ValueError("must be an ISO 8601 time") from None
    return value or None


_Time = Annotated[str | None, AfterValidator(_check_time)]
_NO_CONTROL_CHARACTERS = r"^[^\x00-\x1f\x7f]*$"  # PostgreSQL stores no NUL
_Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS, pattern=_NO_CONTROL_CHARACTERS)]
_OptionalId = Annotated[str, Field(max_length=MAX_ID_CHARS, pattern=_NO_CONTROL_CHARACTERS)] | None
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
_Signatures = list[dict[str, Any]] | None


class _Part(BaseModel):
    """A part of a message. Types are strict, and unknown fields are kept."""

    model_config = ConfigDict(extra="allow", strict=True, hide_input_in_errors=True)


class _TaskHeaders(_Part):
    """What Celery reads of the headers of a task. Celery's documentation calls it message protocol 2."""

    id: _Id
    task: _Id
    root_id: _OptionalId = None
    parent_id: _OptionalId = None
    group: _OptionalId = None
    group_index: int | None = None
    shadow: str | None = None
    eta: _Time = None
    expires: _Time = None
    retries: Annotated[int, BeforeValidator(lambda value: 0 if value is None else value), Field(ge=0)] = 0
    timelimit: Annotated[list[_Seconds] | None, Field(min_length=2, max_length=2)] = None
    argsrepr: str | None = None
    kwargsrepr: str | None = None
    ignore_result: bool | None = None
    replaced_task_nesting: int | None = 0
    stamps: dict[str, Any] | None = None
    stamped_headers: list[str] | None = None


_RESERVED_HEADERS = {*dir(Context), "compression"} - _TaskHeaders.model_fields.keys()
"""Headers that would replace fields and methods of Celery's request, and `compression`: the body is decompressed."""


class _Embed(_Part):
    callbacks: _Signatures = None
    errbacks: _Signatures = None
    chain: _Signatures = None
    chord: dict[str, Any] | None = None


class _Properties(_Part):
    body_encoding: str | None = None
    reply_to: str | None = None
    correlation_id: str | None = None
    priority: int | None = None


_PROPERTIES = ("reply_to", "correlation_id", "priority")
_EMBED = tuple(_Embed.model_fields)
"""No other field: each becomes a field of Celery's request."""


class _Envelope(_Part):
    body: str
    content_type: Annotated[str, Field(alias="content-type")]
    content_encoding: Annotated[str | None, Field(alias="content-encoding")] = None
    headers: Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)] = {}
    properties: Annotated[_Properties, BeforeValidator(lambda value: {} if value is None else value)] = _Properties()


class _Arguments(_Part):
    """What the body has in both versions of the protocol."""

    positional: Annotated[list[Any], Field(alias="args")]
    keyword: Annotated[dict[str, Any], Field(alias="kwargs")]
    embed: _Embed


def read_message(fetched: FetchedMessage, *, queue: str, task_names: Collection[str]) -> TaskMessage:
    """Read a message that was fetched from a queue.

    Raises:
        UnusableMessage: it cannot be read, or no task has its name.
    """
    try:
        envelope = _Envelope.model_validate(_load_json(fetched.text))
        headers, arguments = _headers_and_arguments(envelope, _decode_body(envelope))
        task = _TaskHeaders.model_validate(headers)
        _Arguments.model_validate(arguments)
    except ValidationError as error:
        raise UnusableMessage(DeadLetterReason.UNREADABLE, _problem_text(error)) from None
    if _is_too_deep([headers, arguments]):
        detail = f"the message: must not be nested deeper than {MAX_NESTING} levels"
        raise UnusableMessage(DeadLetterReason.UNREADABLE, detail, task_id=task.id, task_name=task.task)
    if task.task not in task_names:
        detail = "headers.task: no task of payready has this name"
        raise UnusableMessage(DeadLetterReason.UNKNOWN_TASK, detail, task_id=task.id, task_name=task.task)
    return TaskMessage(
        fetched=fetched,
        task_name=task.task,
        task_id=task.id,
        args=arguments["args"],
        kwargs=arguments["kwargs"],
        embed={name: arguments["embed"].get(name) for name in _EMBED},
        headers={**_without_reserved(headers), "retries": task.retries, "eta": task.eta, "expires": task.expires},
        properties={name: getattr(envelope.properties, name) for name in _PROPERTIES},
        queue=queue,
    )


@dataclass(frozen=True, kw_only=True)
class KnownHeaders:
    """What the headers of a message say about its task. None if they do not say it."""

    task_id: str | None = None
    task_name: str | None = None
    eta: datetime | None = None

    def is_waiting_for_eta(self, now: datetime) -> bool:
        """Return whether the task must not run yet."""
        return self.eta is not None and self.eta > now


def read_known_headers(text: bytes) -> KnownHeaders:
    """Return what the headers of a message say, without reading its body."""
    try:
        headers = _TaskHeaders.model_validate(_Envelope.model_validate(_load_json(text)).headers)
    except (ValidationError, UnusableMessage):
        return KnownHeaders()
    return KnownHeaders(task_id=headers.id, task_name=headers.task, eta=_parse_time(headers.eta))


def _load_json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError
        raise UnusableMessage(DeadLetterReason.UNREADABLE, "the message is not JSON") from None


def _decode_body(envelope: _Envelope) -> Any:
    """Return the content of the body: of protocol 2 a list, of protocol 1 a mapping."""
    if envelope.content_type != JSON_CONTENT:
        raise UnusableMessage(DeadLetterReason.UNREADABLE, f"content-type: must be {JSON_CONTENT}")
    compression = envelope.headers.get("compression")
    is_base64 = envelope.properties.body_encoding == "base64"
    try:
        body = b64decode(envelope.body, validate=True) if is_base64 else envelope.body.encode()
    except (binascii.Error, ValueError):
        raise UnusableMessage(DeadLetterReason.UNREADABLE, "body: is not base64") from None
    try:
        content = _decompress(compression, body) if compression else body
        return loads(content, JSON_CONTENT, envelope.content_encoding or "utf-8", accept={JSON_CONTENT})
    except Exception:  # noqa: BLE001 - each codec and each compression has errors of its own
        raise UnusableMessage(DeadLetterReason.UNREADABLE, "body: cannot be decoded as JSON") from None


def _decompress(compression: Any, body: bytes) -> bytes:
    """Return the decompressed body. kombu would decompress it without a limit."""
    decompressor = _DECOMPRESSORS[compression]()
    content: bytes = decompressor.decompress(body, MAX_BODY_BYTES)
    if not decompressor.eof:
        raise ValueError("the body is too large or cut off")
    return content


def _headers_and_arguments(envelope: _Envelope, body: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return headers and arguments in the shape of protocol 2."""
    if isinstance(body, list):
        if len(body) != 3:  # noqa: PLR2004 - args, kwargs, embed
            raise UnusableMessage(DeadLetterReason.UNREADABLE, "body: must have three parts: args, kwargs, embed")
        return envelope.headers, {"args": body[0], "kwargs": body[1], "embed": body[2] or {}}
    if not isinstance(body, dict):
        raise UnusableMessage(DeadLetterReason.UNREADABLE, "body: must be a list of args, kwargs and embed")
    embed = {name: body.get(name) for name in ("callbacks", "errbacks", "chord")}
    arguments = {"args": body.get("args") or [], "kwargs": body.get("kwargs") or {}, "embed": embed}
    names = ("id", "task", "root_id", "parent_id", "eta", "expires", "retries", "timelimit")
    headers = {name: body[name] for name in names if name in body}
    return {**headers, "group": body.get("taskset") or body.get("group"), **envelope.headers}, arguments


def _without_reserved(headers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in headers.items() if name not in _RESERVED_HEADERS}


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_NESTING):
        containers = [
            each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)
        ]
        if not containers:
            return False
        level = [child for container in containers for child in container]
    return True


def _problem_text(error: ValidationError) -> str:
    """Return the first problem: the field and what is wrong with it, without its value."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in problem["loc"]) or "the message"
    scope = {"_TaskHeaders": "headers.", "_Arguments": "body."}.get(error.title, "")
    text = "must be a JSON object" if problem["type"] == "model_type" else problem["msg"]
    return f"{scope}{place}: {text[:200]}"
