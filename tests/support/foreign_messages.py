"""Raw messages as other Celery clients send them, written from the sources of these clients.

| client | version read | message protocol |
|---|---|---|
| celery.node, actumn/celery.node | 0.5.9 (5a1a412) | 2 by default, 1 by `TASK_PROTOCOL` |
| celery-php, gjedeer/celery-php | 8ab6fe5 | 2 |
| rusty-celery, rusty-celery/rusty-celery | 1a0168f | 2 |
| gocelery, gocelery/gocelery | 825d890 | 1 |
| Celery | 5.2.7, 5.4.0, 5.7.0 | 2 by default, 1 by `task_protocol` |

The functions are pure: a client's random ids are derived from the task id.
"""

import json
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from uuid import NAMESPACE_OID, uuid5

TASK = "payments.initiate"
Job = Mapping[str, Any]
NO_CALLBACKS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
JSON_TYPE = "application/json"


@dataclass(frozen=True, kw_only=True)
class AmqpMessage:
    """What a client publishes on RabbitMQ. Properties have the names of AMQP, without `headers`."""

    body: bytes
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]
    exchange: str
    routing_key: str


@dataclass(frozen=True, kw_only=True)
class ForeignMessage:
    """A message of one client, for both brokers."""

    redis: bytes
    """What the client pushes to the left end of the queue's list."""
    amqp: AmqpMessage


def celery_node(job: Job, task_id: str, queue: str, *, protocol: Literal[1, 2] = 2) -> ForeignMessage:
    """Return a message of celery.node, with `sendTask(name, [], job)`.

    - The exchange is empty, and the routing key is the queue.
    - Properties on Redis are named `correlationId` and `replyTo`, as amqplib names them; `correlation_id`, `reply_to`
      and `priority` are missing.
    - Headers are `lang`, `task` and `id` only: no `retries`, `root_id`, `parent_id`, `timelimit` or `argsrepr`.
    - The third part of the body is `{}`: no `callbacks`, `errbacks`, `chain` or `chord`.
    - With protocol 1 headers are `{}`, and the body has `task`, `id`, `args` and `kwargs` only.
    - The delivery tag is a random UUID. JSON has no spaces and is not escaped to ASCII.
    - On RabbitMQ it first declares the queue as a durable classic queue, which fails for a quorum queue.
    """
    headers = {"lang": "js", "task": TASK, "id": task_id} if protocol == 2 else {}
    body = _compact([[], job, {}] if protocol == 2 else {"task": TASK, "id": task_id, "args": [], "kwargs": job})
    envelope = {
        "body": _base64(body),
        "content-type": JSON_TYPE,
        "content-encoding": "utf-8",
        "headers": headers,
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": queue},
            "delivery_mode": 2,
            "delivery_tag": _uuid(task_id, "delivery_tag"),
            "correlationId": task_id,
            "replyTo": "",
        },
    }
    properties = {"content_type": JSON_TYPE, "content_encoding": "utf-8", "delivery_mode": 2}
    amqp = AmqpMessage(
        body=body,
        headers=headers,
        properties={**properties, "correlation_id": task_id, "reply_to": ""},
        exchange="",
        routing_key=queue,
    )
    return ForeignMessage(redis=_compact(envelope), amqp=amqp)


def celery_php(job: Job, task_id: str, queue: str, *, binding: str = "celery") -> ForeignMessage:
    r"""Return a message of celery-php, with `PostTask(name, job)` on a client whose exchange is the queue.

    - On Redis the list is the *exchange* of the client's constructor, so the exchange is filled, with the queue's name.
    - The routing key is the constructor's `binding`, by default `celery`: another queue.
    - The body is plain JSON text: `content-encoding` is `binary`, and `body_encoding` is missing.
    - `correlation_id` and the property `priority` are missing; `priority` is in `delivery_info`.
    - The delivery tag and `reply_to` are the task id, which is no UUID: `php_` and `uniqid`, such as
      `php_5f1d7a3b9c2e14.83920175`.
    - Headers are `lang` (`py`), `task` and `id` only, and the third part of the body is null.
    - JSON has no spaces, is escaped to ASCII, and a slash is `\/`.
    - On RabbitMQ it declares the exchange (direct, durable) and the queue as a classic queue, and binds them.
    """
    headers = {"lang": "py", "task": TASK, "id": task_id}
    body = _php_json([[], job, None])
    envelope = {
        "content-type": JSON_TYPE,
        "content-encoding": "binary",
        "properties": {
            "reply_to": task_id,
            "delivery_info": {"priority": 0, "routing_key": binding, "exchange": queue},
            "delivery_mode": 2,
            "delivery_tag": task_id,
        },
        "headers": headers,
        "body": body,
    }
    amqp = AmqpMessage(
        body=body.encode(),
        headers=headers,
        properties={
            "correlation_id": task_id,
            "content_type": JSON_TYPE,
            "content_encoding": "utf-8",
            "delivery_mode": 2,
        },
        exchange=queue,
        routing_key=queue,  # an argument of `PostTask`, for RabbitMQ only
    )
    return ForeignMessage(redis=_php_json(envelope).encode(), amqp=amqp)


def rusty_celery(job: Job, task_id: str, queue: str) -> ForeignMessage:
    """Return a message of rusty-celery.

    - The routing key on Redis is `celery`, whatever the queue is; the exchange is empty.
    - `retries`, `lang`, `root_id` and all other headers without a value are null; `timelimit` is two nulls.
    - `group_index`, `ignore_result`, `delivery_mode` and the property `priority` are missing; `reply_to` is null.
    - The header `meth` of the first version of protocol 2 exists.
    - The keys of all JSON objects except the body's are sorted, as serde_json's map sorts them.
    - The delivery tag is a random UUID, a new one for each push.
    - On RabbitMQ headers without a value are missing, but `timelimit` has two voids.
    """
    unset = ("lang", "root_id", "parent_id", "group", "meth", "shadow", "eta", "expires", "retries")
    known = {"id": task_id, "task": TASK, "timelimit": [None, None], "origin": "gen4711@orders"}
    body = _compact([[], job, NO_CALLBACKS])
    envelope = {
        "body": _base64(body),
        "content-encoding": "utf-8",
        "content-type": JSON_TYPE,
        "headers": {**dict.fromkeys((*unset, "argsrepr", "kwargsrepr")), **known},
        "properties": {
            "body_encoding": "base64",
            "correlation_id": task_id,
            "delivery_info": {"exchange": "", "routing_key": "celery"},
            "delivery_tag": _uuid(task_id, "delivery_tag"),
            "reply_to": None,
        },
    }
    amqp = AmqpMessage(
        body=body,
        headers=known,
        properties={
            "correlation_id": task_id,
            "content_type": JSON_TYPE,
            "content_encoding": "utf-8",
            "priority": 0,
            "delivery_mode": 2,
        },
        exchange="",
        routing_key=queue,
    )
    return ForeignMessage(redis=json.dumps(envelope, separators=(",", ":"), sort_keys=True).encode(), amqp=amqp)


def gocelery(job: Job, task_id: str, queue: str) -> ForeignMessage:
    """Return a message of gocelery, with `DelayKwargs` and the broker's `QueueName` set to the queue.

    - Protocol 1. On Redis the field `headers` is missing.
    - Exchange and routing key are both `celery`, whatever the queue is.
    - `correlation_id` and `reply_to` are random UUIDs, and neither is the task id.
    - `priority` is in `delivery_info` only.
    - The body has `id`, `task`, `args`, `kwargs`, `retries`, `eta` and `expires` only: no `utc`, `callbacks`,
      `errbacks`, `timelimit`, `taskset` or `chord`.
    - The keys of the job are sorted, and `<`, `>` and `&` are escaped, as Go's encoder does.
    - On RabbitMQ the queue is always `celery`, with neither headers nor `correlation_id`.
    """
    kwargs = dict(sorted(job.items()))
    body = {"id": task_id, "task": TASK, "args": [], "kwargs": kwargs, "retries": 0, "eta": None, "expires": None}
    envelope = {
        "body": _base64(_go_json(body)),
        "content-type": JSON_TYPE,
        "properties": {
            "body_encoding": "base64",
            "correlation_id": _uuid(task_id, "correlation_id"),
            "reply_to": _uuid(task_id, "reply_to"),
            "delivery_info": {"priority": 0, "routing_key": "celery", "exchange": "celery"},
            "delivery_mode": 2,
            "delivery_tag": _uuid(task_id, "delivery_tag"),
        },
        "content-encoding": "utf-8",
    }
    amqp = AmqpMessage(
        body=_go_json(body),
        headers={},
        properties={"content_type": JSON_TYPE, "delivery_mode": 2},
        exchange="",
        routing_key="celery",
    )
    return ForeignMessage(redis=_go_json(envelope), amqp=amqp)


def celery_protocol_1(job: Job, task_id: str, queue: str) -> ForeignMessage:
    """Return a message of Celery 5.2 to 5.7 with `task_protocol=1`; the three are equal.

    - Headers are `{}`: task name and id are in the body only.
    - The body is an object with `utc`, `taskset`, `timelimit`, `callbacks`, `errbacks` and `chord`, and no `chain`.
    - `root_id` and `parent_id` do not exist.
    """
    body = {
        "task": TASK,
        "id": task_id,
        "args": [],
        "kwargs": job,
        "group": None,
        "group_index": None,
        "retries": 0,
        "eta": None,
        "expires": None,
        "utc": True,
        "callbacks": None,
        "errbacks": None,
        "timelimit": [None, None],
        "taskset": None,
        "chord": None,
    }
    return _celery_message(json.dumps(body).encode(), {}, task_id, queue)


def celery_protocol_2(
    job: Job, task_id: str, queue: str, *, version: Literal["5.2", "5.4", "5.7"] = "5.2"
) -> ForeignMessage:
    """Return a message of Celery 5.2, 5.4 or 5.7 with its default protocol.

    - 5.2 has no `replaced_task_nesting`, `stamped_headers` and `stamps`.
    - `ignore_result` is false in 5.2 and 5.4, and null in 5.7.
    """
    headers: dict[str, Any] = {
        "lang": "py",
        "task": TASK,
        "id": task_id,
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": task_id,
        "parent_id": None,
        "argsrepr": "()",
        "kwargsrepr": repr(dict(job)),
        "origin": "gen4711@orders",
        "ignore_result": None if version == "5.7" else False,
    }
    if version != "5.2":
        headers |= {"replaced_task_nesting": 0, "stamped_headers": None, "stamps": {}}
    return _celery_message(json.dumps([[], job, NO_CALLBACKS]).encode(), headers, task_id, queue)


def _celery_message(body: bytes, headers: Mapping[str, Any], task_id: str, queue: str) -> ForeignMessage:
    shared = {"correlation_id": task_id, "reply_to": _uuid(task_id, "reply_to"), "delivery_mode": 2, "priority": 0}
    envelope = {
        "body": _base64(body),
        "content-encoding": "utf-8",
        "content-type": JSON_TYPE,
        "headers": headers,
        "properties": {
            **shared,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "body_encoding": "base64",
            "delivery_tag": _uuid(task_id, "delivery_tag"),
        },
    }
    properties = {**shared, "content_type": JSON_TYPE, "content_encoding": "utf-8"}
    amqp = AmqpMessage(body=body, headers=headers, properties=properties, exchange="", routing_key=queue)
    return ForeignMessage(redis=json.dumps(envelope).encode(), amqp=amqp)


def _uuid(task_id: str, name: str) -> str:
    return str(uuid5(NAMESPACE_OID, f"{name} of {task_id}"))


def _base64(body: bytes) -> str:
    return b64encode(body).decode()


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _php_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")).replace("/", r"\/")


def _go_json(value: Any) -> bytes:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode()
