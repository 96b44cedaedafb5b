"""Malformed messages, as other apps, other languages and failovers put them into a shared broker.

Each mapping has a message by the name of its shape, in the form in which kombu's Redis transport stores messages: JSON
with `body`, `content-type`, `headers` and `properties`. `publish_on_rabbitmq` sends the same messages through RabbitMQ.
"""

import bz2
import json
import lzma
import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Any

from amqp.basic_message import Message

REMOVED = object()
"""Value of a field that the message does not have."""
NO_ARGUMENTS = b"[[], {}, {}]"
DEEP_JSON = b"[" * 10_000 + b"]" * 10_000
LESS_DEEP_JSON = b"[" * 900 + b"]" * 900
"""Python decodes it, but it is too deep to be encoded again by a function that is called from others."""
LONG_TEXT = "x" * 10_000
HUGE = 10**40
NO_TIMES: tuple[Any, ...] = (
    0,
    -1,
    1.5e300,
    True,
    "soon",
    "2026-13-01",
    "2026-01-01T00:00:00+25:00",
    "9" * 30,
    [],
    {},
    ["2026"],
)


def message(content: bytes = NO_ARGUMENTS, /, *, headers: Any = None, properties: Any = None, **fields: Any) -> bytes:
    """Return a message of `payments.cancel` without arguments.

    `headers` and `properties` are changes if they are mappings, and replace the part otherwise. `_` in the names of
    fields is `-`.
    """
    default_headers = {"lang": "js", "task": "payments.cancel", "id": "task-1", "ignore_result": False}
    default_properties = {"body_encoding": "base64", "delivery_tag": "tag-1", "correlation_id": "task-1"}
    envelope = {
        "body": b64encode(content).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": _changed(default_headers, headers),
        "properties": _changed(default_properties, properties),
    }
    return json.dumps(_changed(envelope, {name.replace("_", "-"): value for name, value in fields.items()})).encode()


def _changed(part: Mapping[str, Any], changes: Any) -> Any:
    if changes is not None and not isinstance(changes, Mapping):
        return changes
    return {name: value for name, value in {**part, **(changes or {})}.items() if value is not REMOVED}


def protocol_1(**fields: Any) -> bytes:
    """Return a message of Celery's protocol 1: the body has the fields of the task. `fields` are changes."""
    task = {"id": "task-1", "task": "payments.cancel", "args": [], "kwargs": {}}
    headers = {"task": REMOVED, "id": REMOVED}
    return message(json.dumps(_changed(task, fields)).encode(), headers=headers)


def call(task: str, *args: Any, headers: Any = None, **kwargs: Any) -> bytes:
    """Return a message of a task with these arguments."""
    content = json.dumps([args, kwargs, {}]).encode()
    return message(content, headers={"task": task, "id": f"{task}-{zlib.crc32(content)}", **(headers or {})})


def _embedding(**embed: Any) -> bytes:
    return message(json.dumps([[], {}, embed]).encode())


def _with_raw_header(value: bytes) -> bytes:
    """Return a message with a header that `json.dumps` does not write."""
    return message(headers={"x": "here"}).replace(b'"here"', value)


_TEXTS = {
    "text": b"no message",
    "empty": b"",
    "blank": b" \n",
    "number": b"12",
    "string": b'"args"',
    "null": b"null",
    "NaN": b"NaN",
    "list": b"[1, 2]",
    "empty object": b"{}",
    "bare job": b'{"payment_id": "pay_1", "account_id": "acct_1"}',
    "bare arguments": b'[["pay_1"], {}, {}]',
    "bare body of protocol 1": b'{"id": "task-1", "task": "payments.cancel", "args": [], "kwargs": {}}',
    "invalid UTF-8": b"\xff\xfe{}\x80",
    "UTF-16": "no message".encode("utf-16"),
    "NUL characters": b"\x00\x00",
    "deep list": DEEP_JSON,
    "two messages": message() * 2,
    "cut message": message()[:-20],
    "header of 10,000 digits": _with_raw_header(b"9" * 10_000),
    "deep header": _with_raw_header(DEEP_JSON),
    "header of 400 levels": _with_raw_header(b"[" * 400 + b"]" * 400),
    "less deep header": _with_raw_header(LESS_DEEP_JSON),
}
"""Texts that are no message at all."""

_ENVELOPES = {
    "no body": message(body=REMOVED),
    "body null": message(body=None),
    "body a list": message(body=[[], {}, {}]),
    "body an object": message(body={"args": []}),
    "body not base64": message(body="%%%"),
    "body of base64 with a wrong length": message(body="W1"),
    "body not ASCII": message(body="Käse"),
    "body JSON but declared base64": message(body="[[], {}, {}]"),
    "body base64 but not declared": message(properties={"body_encoding": REMOVED}),
    "body encoding unknown": message(properties={"body_encoding": "rot13"}),
    "body encoding a list": message(properties={"body_encoding": ["base64"]}),
    "no content type": message(content_type=REMOVED),
    "content type null": message(content_type=None),
    "content type a list": message(content_type=["application/json"]),
    "content type pickle": message(b"\x80\x04K\x01.", content_type="application/x-python-serialize"),
    "content type yaml": message(b"- []\n- {}\n- {}\n", content_type="application/x-yaml"),
    "content type msgpack": message(b"\x93\x90\x80\x80", content_type="application/x-msgpack"),
    "content type binary": message(content_type="application/data"),
    "content type with parameter": message(content_type="application/json; charset=utf-8"),
    "content encoding a number": message(content_encoding=8),
    "no headers": message(headers=REMOVED),
    "headers null": message(headers=None).replace(b'"headers": {', b'"headers": null, "unused": {'),
    "headers a list": message(headers=[["id", "task-1"]]),
    "headers a string": message(headers="id=task-1"),
    "properties a list": message(properties=[]),
    "properties a string": message(properties="base64"),
    "no properties": message(properties=REMOVED),
    "priority a string": message(properties={"priority": "high"}),
    "reply to a list": message(properties={"reply_to": ["q"]}),
    "correlation id a number": message(properties={"correlation_id": 1}),
    "compression unknown": message(headers={"compression": "application/x-unknown"}),
    "compression a list": message(headers={"compression": ["gzip"]}),
    "compressed body of 64 MiB": message(
        zlib.compress(b" " * (64 * 1024 * 1024)), headers={"compression": "application/x-gzip"}
    ),
    "compressed garbage": message(b"no zlib", headers={"compression": "application/x-gzip"}),
    "compressed text": message(zlib.compress(b"no JSON"), headers={"compression": "application/x-gzip"}),
    "compressed body that is cut": message(
        zlib.compress(NO_ARGUMENTS)[:-6], headers={"compression": "application/x-gzip"}
    ),
}
"""Messages whose envelope lacks a field, or has it with a wrong type."""

_IDS = {
    f"{name} {kind}": message(headers={name: value})
    for name in ("id", "task")
    for kind, value in {
        "missing": REMOVED,
        "null": None,
        "empty": "",
        "a number": 7,
        "a list": ["task-1"],
        "an object": {"id": "task-1"},
        "of 10,000 characters": LONG_TEXT,
        "with NUL": "a\x00b",
        "with a newline": "a\nb",
        "with a lone surrogate": "a\ud800b",
    }.items()
}

_HEADERS = {
    "task unknown": message(headers={"task": "shop.ship_order"}),
    "task of Celery for other workers": message(headers={"task": "payments.initiate "}),
    "root id a number": message(headers={"root_id": 1}),
    "parent id of 10,000 characters": message(headers={"parent_id": LONG_TEXT}),
    "group an object": message(headers={"group": {}}),
    "group index a string": message(headers={"group_index": "first"}),
    "shadow a list": message(headers={"shadow": ["name"]}),
    "retries negative": message(headers={"retries": -1}),
    "retries a string": message(headers={"retries": "3"}),
    "retries a fraction": message(headers={"retries": 1.5}),
    "retries a list": message(headers={"retries": []}),
    "time limit a number": message(headers={"timelimit": 3}),
    "time limit of one": message(headers={"timelimit": [3]}),
    "time limit of three": message(headers={"timelimit": [1, 2, 3]}),
    "time limit of strings": message(headers={"timelimit": ["1", "2"]}),
    "time limit negative": message(headers={"timelimit": [-1, None]}),
    "time limit infinite": message(headers={"timelimit": [float("inf"), None]}),
    "arguments text a list": message(headers={"argsrepr": []}),
    "ignore result a string": message(headers={"ignore_result": "yes"}),
    "stamps a list": message(headers={"stamps": ["a"]}),
    "stamped headers a string": message(headers={"stamped_headers": "a"}),
    "replaced task nesting a string": message(headers={"replaced_task_nesting": "1"}),
    **{f"{name} {value!r:.30}": message(headers={name: value}) for name in ("eta", "expires") for value in NO_TIMES},
}

_BODIES = {
    "body empty": message(b""),
    "body text": message(b"{no JSON"),
    "body null": message(b"null"),
    "body a number": message(b"3"),
    "body a string": message(b'"args"'),
    "body bytes": message(b"\x80\xff"),
    "body an empty list": message(b"[]"),
    "body of two parts": message(b"[[], {}]"),
    "body of four parts": message(b"[[], {}, {}, {}]"),
    "body deep": message(b"[[" + DEEP_JSON + b"], {}, {}]"),
    "body less deep": message(b"[[" + LESS_DEEP_JSON + b"], {}, {}]"),
    "embed deep": message(b'[[], {}, {"callbacks": [{"x": ' + LESS_DEEP_JSON + b"}]}]"),
    "args an object": message(b'[{"a": 1}, {}, {}]'),
    "args a string": message(b'["pay_1", {}, {}]'),
    "args null": message(b"[null, {}, {}]"),
    "kwargs a list": message(b"[[], [], {}]"),
    "kwargs null": message(b"[[], null, {}]"),
    "kwargs a number": message(b"[[], 1, {}]"),
    "embed a list": message(b"[[], {}, [1]]"),
    "embed a string": message(b'[[], {}, "callbacks"]'),
    "callbacks an object": _embedding(callbacks={"task": "a"}),
    "callbacks strings": _embedding(callbacks=["ledger.execute"]),
    "errbacks a number": _embedding(errbacks=1),
    "chain of numbers": _embedding(chain=[1, 2]),
    "chord a list": _embedding(chord=[{}]),
    "number of 10,000 digits": message(b"[[" + b"9" * 10_000 + b"], {}, {}]"),
}

_PROTOCOL_1_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "no id": {"id": REMOVED},
    "no task": {"task": REMOVED},
    "id a list": {"id": []},
    "task a list": {"task": []},
    "task unknown": {"task": "shop.ship_order"},
    "args an object": {"args": {"a": 1}},
    "args a string": {"args": "pay_1"},
    "kwargs a list": {"kwargs": [1]},
    "retries a string": {"retries": "1"},
    "eta words": {"eta": "tomorrow"},
    "expires a number": {"expires": 5},
    "time limit an object": {"timelimit": {"soft": 1}},
    "callbacks an object": {"callbacks": {"a": 1}},
    "chord a list": {"chord": [1]},
    "task set a list": {"taskset": [1]},
}

UNUSABLE: Mapping[str, bytes] = {
    **_TEXTS,
    **_ENVELOPES,
    **_IDS,
    **_HEADERS,
    **{f"content: {name}": text for name, text in _BODIES.items()},
    **{f"protocol 1: {name}": protocol_1(**fields) for name, fields in _PROTOCOL_1_FIELDS.items()},
}
"""Messages that no worker can process: each is a dead letter."""

_TASK_CALLS = {
    "refresh of numbers": call("balances.refresh", 1, 2),
    "refresh of NUL": call("balances.refresh", "acct\x00", "r\x00"),
    "refresh of lone surrogates": call("balances.refresh", "\ud800", "\ud800"),
    "refresh of long ids": call("balances.refresh", LONG_TEXT, LONG_TEXT),
    "refresh without arguments": call("balances.refresh"),
    "refresh with keyword arguments": call("balances.refresh", account=1),
    "deliver a string": call("outcomes.deliver", "task-1"),
    "deliver null": call("outcomes.deliver", None),
    "deliver objects": call("outcomes.deliver", [{"a": 1}]),
    "apply an object": call("balances.apply", {"a": 1}),
    "apply NUL": call("balances.apply", "\x00"),
    "apply huge number": call("balances.apply", HUGE),
    "poll lists": call("balances.poll", [], []),
    "read account NaN": call("accounts.read", float("nan"), None, None),
    "cancel by task null": call("payments.cancel_by_task", None),
    "cancel by task numbers": call("payments.cancel_by_task", [1]),
    "cancel a list": call("payments.cancel", ["pay_1"]),
    "cancel NUL": call("payments.cancel", "\x00"),
    "end hold of an object": call("payments.end_hold", {}),
    "expire with arguments": call("payments.expire", 1),
    "job of numbers": call("payments.initiate", payment_id=1, account_id=2),
    "job a list": call("payments.initiate", [1]),
    "two jobs": call("payments.initiate", {}, {}),
    "job with NUL as payment id": call("payments.initiate", payment_id="\x00", account_id="acct_prompt000009"),
    "job with a lone surrogate": call("payments.initiate", payment_id="\ud800", account_id="acct_prompt000009"),
    "job of 10,000 characters": call("payments.initiate", payment_id=LONG_TEXT, account_id=LONG_TEXT),
    "job of NaN": call("payments.initiate", payment_id="pay_1", account_id="acct_prompt000009", amount=float("nan")),
    "job with a huge number": call("payments.initiate", payment_id="pay_1", account_id="acct_1", timeout_s=HUGE),
}
"""Tasks of payready with arguments that they do not accept."""

_HARMLESS_HEADERS: Mapping[str, Mapping[str, Any]] = {
    "retries null": {"retries": None},
    "retries huge": {"retries": HUGE},
    "group index huge": {"group_index": HUGE},
    "time limit huge": {"timelimit": [1e308, 1e308]},
    "eta year 1": {"eta": "0001-01-01T00:00:00+14:00"},
    "expires year 1": {"expires": "0001-01-01T00:00:00"},
    "expires year 9999": {"expires": "9999-12-31T23:59:59.999999-23:59"},
    "eta empty": {"eta": ""},
    "expires empty": {"expires": ""},
    "stamped without stamps": {"stamped_headers": ["a"], "stamps": None},
    "names of Celery's request": {"get": 1, "update": 2, "hostname": 3, "args": 4, "called_directly": 5},
    "request fields of Celery": {"delivery_info": "x", "errbacks": 1, "chord": 1, "chain": 1, "headers": [1]},
    "trace context garbage": {"traceparent": 12, "tracestate": ["x"], "baggage": {}},
    "delivery count": {"x-delivery-count": "many"},
}

_HARMLESS_ENVELOPES = {
    "no delivery tag": message(headers={"id": "no-tag"}, properties={"delivery_tag": REMOVED}),
    "delivery tag a list": message(headers={"id": "list-tag"}, properties={"delivery_tag": [1]}),
    "exchange filled": message(
        headers={"id": "exchange"},
        properties={"delivery_info": {"exchange": "tasks", "routing_key": "payments.#", "priority": "x"}},
    ),
    "delivery info a string": message(headers={"id": "delivery-info"}, properties={"delivery_info": "payments"}),
    "duplicate keys": message(headers={"id": "duplicate"}).replace(b'{"body"', b'{"body": 1, "headers": 2, "body"'),
    "unknown fields": message(headers={"id": "unknown-fields"}, x={"y": [None]}),
    "embed with other fields": message(b'[[], {}, {"hostname": 1, "self": 2}]', headers={"id": "embed"}),
    "body compressed by bzip2": message(
        bz2.compress(NO_ARGUMENTS), headers={"id": "bzip2", "compression": "application/x-bz2"}
    ),
    "body compressed by lzma": message(
        lzma.compress(NO_ARGUMENTS), headers={"id": "lzma", "compression": "application/x-lzma"}
    ),
    "compressed body": message(
        zlib.compress(NO_ARGUMENTS), headers={"id": "compressed", "compression": "application/x-gzip"}
    ),
    "embed null": message(b"[[], {}, null]", headers={"id": "embed-null"}),
    "content encoding unknown": message(headers={"id": "encoding"}, content_encoding="klingon"),
    "content encoding with NUL": message(headers={"id": "encoding-nul"}, content_encoding="utf\x00-8"),
    "lone surrogate as name": message(b'[[], {"\\ud800": 1}, {}]', headers={"id": "surrogate"}),
    "NaN in arguments": message(b"[[NaN], {}, {}]", headers={"id": "nan"}),
    "protocol 1 without arguments": protocol_1(id="protocol-1", args=None, kwargs=None, expires=None),
}

USABLE: Mapping[str, bytes] = {
    **_TASK_CALLS,
    **_HARMLESS_ENVELOPES,
    **{
        f"header {name}": call("payments.cancel", f"pay_{name}", headers=headers)
        for name, headers in _HARMLESS_HEADERS.items()
    },
}
"""Messages with valid fields: a worker passes them to their task, which fails or has nothing to do."""


def as_amqp_messages(text: bytes) -> list[Message]:
    """Return the message for RabbitMQ, and the bare text for the case that AMQP cannot carry the message."""
    bare = Message(text)
    try:
        stored = json.loads(text)
        properties = stored.get("properties") or {}
        is_base64 = properties.get("body_encoding") == "base64"
        body = b64decode(stored["body"], validate=True) if is_base64 else stored["body"].encode()
        names = ("priority", "reply_to", "correlation_id")
        parts = {name: properties[name] for name in names if properties.get(name) is not None}
        encoding = stored.get("content-encoding")
        if stored.get("content-type") is not None:
            parts["content_type"] = stored["content-type"]
        headers = stored.get("headers") or {}
        return [Message(body, application_headers=headers, content_encoding=encoding, **parts), bare]
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return [bare]
