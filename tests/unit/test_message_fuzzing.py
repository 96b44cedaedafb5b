"""Mutated messages never raise an error that would end the consumer of a queue or the event loop of Celery."""

import copy
import json
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks import suspension
from tasks.app import app
from tasks.batch_processing import PoolCapacity
from tasks.celery_handover import CeleryHandover
from tasks.task_messages import FetchedMessage, UnusableMessage, read_message
from tests.support.fake_source import FakeSource
from tests.support.foreign_messages import celery_node, celery_php, gocelery, rusty_celery
from tests.unit.test_malformed_messages import celery_consumer
from worker.errors import InvalidJob

JOB = {"payment_id": "pay_1", "account_id": "acct_prompt000001", "timeout_s": 20}
CALLBACK = {"task": "ledger.execute", "args": [1], "kwargs": {}, "options": {"queue": "svc"}, "subtask_type": None}
NO_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
ENVELOPE = {"content-encoding": "utf-8", "content-type": "application/json"}
PROPERTIES = {"body_encoding": "base64", "delivery_mode": 2, "delivery_tag": "1", "priority": 0}


def with_decoded_body(text: bytes) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(text)
    is_base64 = message["properties"].get("body_encoding") == "base64"
    return {**message, "body": json.loads(b64decode(message["body"]) if is_base64 else message["body"])}


VALID: list[dict[str, Any]] = [
    *(
        with_decoded_body(make(JOB, "t1", "payments").redis)
        for make in (celery_node, celery_php, gocelery, rusty_celery)
    ),
    {  # Celery
        **ENVELOPE,
        "body": [[], JOB, {**NO_EMBED, "callbacks": [CALLBACK], "chain": [CALLBACK], "chord": {**CALLBACK, "x": 1}}],
        "headers": {
            "lang": "py",
            "task": "payments.initiate",
            "id": "t1",
            "shadow": None,
            "group": "g",
            "group_index": 1,
            "eta": "2026-01-01T00:00:00",
            "expires": "2099-01-01T00:00:00+00:00",
            "retries": 0,
            "root_id": "t1",
            "timelimit": [None, 9],
            "parent_id": None,
            "argsrepr": "()",
            "kwargsrepr": "{}",
            "origin": "gen1@x",
            "ignore_result": False,
            "replaced_task_nesting": 0,
            "stamped_headers": ["a"],
            "stamps": {"a": [1]},
        },
        "properties": {**PROPERTIES, "correlation_id": "t1", "reply_to": "r", "delivery_info": {"exchange": ""}},
    },
    {  # payready
        **ENVELOPE,
        "body": [["acct_1", "refresh_1", True], {}, {}],
        "headers": {"task": "balances.refresh", "id": "t1", "eta": "2099-01-01T00:00:00", "ignore_result": True},
        "properties": PROPERTIES,
    },
]
TEXTS = st.text(st.characters(exclude_categories=[]), max_size=8) | st.sampled_from(
    [
        "",
        "payments.initiate",
        "2026-01-01",
        "0001-01-01T00:00:00+14:00",
        "9999-12-31",
        "base64",
        "\x00",
        "\ud800",
        "gzip",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([10**30, -1]) | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=8
)
CELERY_NAMES = st.sampled_from(
    ["id", "task", "eta", "expires", "args", "kwargs", "get", "update", "hostname", "self", "compression", "chord"]
)


def places(part: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container of a message with each of its keys or positions."""
    for key in list(part) if isinstance(part, dict) else range(len(part)):
        yield part, key
        if isinstance(part[key], dict | list):
            yield from places(part[key])


@st.composite
def mutated_messages(draw: st.DrawFn) -> bytes:
    message = copy.deepcopy(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 4))):
        container, key = draw(st.sampled_from(list(places(message))))
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "replace":
            container[key] = draw(VALUES)
        elif change == "remove":
            del container[key]
        elif isinstance(container, dict):
            container[draw(CELERY_NAMES | TEXTS)] = draw(VALUES)
        else:
            container.insert(key, draw(VALUES))
        if not message:
            break
    if "body" in message and draw(st.integers(0, 9)):
        body = draw(cut_or_whole(json.dumps(message["body"]).encode()))
        is_base64 = isinstance(message.get("properties"), dict) and "body_encoding" in message["properties"]
        message["body"] = b64encode(body).decode() if is_base64 else body.decode(errors="replace")
    return draw(cut_or_whole(json.dumps(message).encode()))


@st.composite
def cut_or_whole(draw: st.DrawFn, text: bytes) -> bytes:
    """Return the text, or seldom with a part of it replaced by other bytes."""
    if draw(st.integers(0, 9)):
        return text
    start, end = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
    return text[:start] + draw(st.binary(max_size=4)) + text[end:]


@pytest.fixture
def _no_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what Celery does with results of expired messages: it needs Redis."""
    for name in ("mark_as_revoked", "mark_as_failure"):
        monkeypatch.setattr(app.backend, name, lambda *_, **__: None)


@pytest.mark.usefixtures("_no_results")
@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(mutated_messages())
def test_mutated_message_is_accepted_by_celery_or_a_dead_letter(text: bytes) -> None:
    fetched = FetchedMessage(tag="tag", deliveries=1, text=text)
    try:
        message = read_message(fetched, queue="payments", task_names=CONSUMER.strategies)
    except UnusableMessage as error:
        assert error.detail  # noqa: PT017 - either outcome is right
        return
    source = FakeSource()
    handover = CeleryHandover(CONSUMER, PoolCapacity(1))
    handover.hand_over(source, [message])
    assert handover.take_refused("payments") == []
    with suppress(InvalidJob):  # of callbacks that can never be sent
        suspension.assign_task_ids_and_make_continuation(message.as_request_context("worker@test"))


app.loader.import_default_modules()
CONSUMER = celery_consumer([])
