"""Delivery counters: each delivery is counted once and logged without any of its content."""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import REGISTRY
from sqlalchemy.exc import OperationalError

from cli.log_event_meanings import COMPUTED_EVENTS
from config.settings import Settings
from tests.webhook.conftest import OLD_SECRET, SECRET, delivery, sign
from webhook import endpoint, wiring
from webhook.delivery_counters import DeliveryCounters
from webhook.events import MAX_BODY_BYTES
from worker import flow
from worker.flow import FollowUp

Send = Callable[..., int]
PRIVATE = "Ada Lovelace"
SHARED_FIELDS = {"event", "level", "logger", "timestamp"}
"""Fields of every log line."""


def counts() -> dict[str, float]:
    """Return the non-zero counters of deliveries and events, by metric and result."""
    found = {}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            if sample.name in ("payready_webhook_deliveries_total", "payready_webhook_events_total") and sample.value:
                found[f"{metric.name.removeprefix('payready_webhook_')} {sample.labels['result']}"] = sample.value
    return found


def webhook_events(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return the log events of the package `webhook`."""
    return [
        record.msg for record in caplog.records if record.name.startswith("webhook") and isinstance(record.msg, dict)
    ]


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Send:
    """Return a function that sends a delivery to the ASGI application, which commits nothing."""
    chosen = Settings(webhook_secrets=(SECRET, OLD_SECRET))
    monkeypatch.setattr(endpoint, "settings", lambda: chosen)
    monkeypatch.setattr(endpoint, "_secrets", lambda: (SECRET, OLD_SECRET))
    monkeypatch.setattr(wiring, "runtime", lambda: None)
    monkeypatch.setattr(wiring, "dispatch_leaving_callbacks_to_workers", lambda _: None)
    monkeypatch.setattr(flow, "ingest_events_and_resolve_payments", lambda *_: FollowUp())
    monkeypatch.setattr(endpoint, "delivery_counters", DeliveryCounters())
    caplog.set_level(logging.DEBUG)

    def send(
        body: bytes, *, secret: str = SECRET, age_s: int = 0, parts: int = 1, leave: bool = False, **headers: str
    ) -> int:
        timestamp = str(int(time.time()) - age_s)
        headers = {"quiltt-timestamp": timestamp, "quiltt-signature": sign(body, timestamp, secret)} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        size = -(-len(body) // parts) or 1
        chunks = [body[start : start + size] for start in range(0, max(len(body), 1), size)]
        messages: list[dict[str, Any]] = [
            {"type": "http.request", "body": chunk, "more_body": leave or number < len(chunks)}
            for number, chunk in enumerate(chunks, 1)
        ]
        if leave:
            messages.append({"type": "http.disconnect"})
        return call([(name.encode(), value.encode()) for name, value in headers.items()], messages)

    return send


def call(headers: list[tuple[bytes, bytes]], messages: list[dict[str, Any]]) -> int:
    """Call the application and return the status."""
    responses: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        responses.append(message)

    scope = {"type": "http", "method": "POST", "path": "/webhooks/quiltt", "headers": headers}
    asyncio.run(endpoint.app(scope, receive, send))
    return int(responses[0]["status"])


UNPARSEABLE = b'{"type": "balance.created", "record": {"name": "Ada Lovelace"}}'
SYNC = delivery("bal_1", source="SYNC")
PROFILE = b'{"events": [{"type": "profile.updated", "record": {"name": "Ada Lovelace"}}]}'
BROKEN = PROFILE.replace(b'"profile.updated"', b'"connection.disconnected", "at": "2026-11-22T12:00:00Z"').replace(
    b'"name"', b'"id": "conn_1", "name"'
)
MIXED = b'{"events": [%s, %s, {"type": "profile.created", "record": {"name": "Ada Lovelace"}}]}' % (
    UNPARSEABLE,
    json.dumps(json.loads(delivery("bal_1"))["events"][0]).encode(),
)
CASES: dict[str, tuple[int, bytes, dict[str, Any], dict[str, float]]] = {
    "routine": (204, SYNC, {}, {"events routine": 1}),
    "routine, of another type": (204, PROFILE, {}, {"events routine": 1}),
    "routine, with the old secret": (204, SYNC, {"secret": OLD_SECRET}, {"events routine": 1}),
    "routine, in chunks": (204, SYNC, {"parts": 7}, {"events routine": 1}),
    "balance": (204, delivery("bal_1", "bal_2"), {}, {"events balance": 2}),
    "connection": (204, BROKEN, {}, {"events connection": 1}),
    "quarantined": (204, MIXED, {}, {"events balance": 1, "events quarantined": 1, "events routine": 1}),
    "stale": (401, delivery("bal_1"), {"age_s": 400}, {}),
    "stale, from the future": (401, delivery("bal_1"), {"age_s": -400}, {}),
    "mismatch": (401, PROFILE, {"secret": "whsec_unknown"}, {}),
    "mismatch, and old": (401, PROFILE, {"secret": "whsec_unknown", "age_s": 400}, {}),
    "missing": (401, PROFILE, {"quiltt_signature": ""}, {}),
    "malformed": (401, PROFILE, {"quiltt_timestamp": "+1"}, {}),
    "malformed, not ASCII": (401, PROFILE, {"quiltt_signature": "é" * 43 + "="}, {}),
    "content_type": (415, PROFILE, {"content_type": "text/plain"}, {}),
    "invalid_envelope": (400, PROFILE[:-1], {}, {}),
    "invalid_json": (400, PROFILE[:-2] + b",Ada Lovelace]}", {}, {"events invalid_json": 1, "events routine": 1}),
    "too_large": (413, PROFILE.ljust(MAX_BODY_BYTES + 1), {}, {}),
    "too_large, in chunks": (413, PROFILE.ljust(9 * MAX_BODY_BYTES), {"parts": 9}, {}),
    "client_disconnected": (400, PROFILE, {"leave": True}, {}),
    "client_disconnected, before the body": (400, b"", {"leave": True}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_delivery_is_counted_and_logged_once_by_result(send: Send, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A stale delivery, which Quiltt signed, differs from a forged one. The line has no content of the body."""
    status, body, options, events = CASES[name]
    before = counts()
    assert send(body, **options) == status
    counted = {key: value - before.get(key, 0) for key, value in counts().items() if value != before.get(key, 0)}
    result = name.split(",", maxsplit=1)[0]
    assert counted == {f"deliveries {result}": 1, **events}
    [line] = webhook_events(caplog)
    assert (line["event"], line["result"]) == ("webhook.delivery", result)
    assert PRIVATE not in str(line)
    assert ("age_s" in line) == (result == "stale")
    assert line.get("age_s", 0) == pytest.approx(options["age_s"] if result == "stale" else 0, abs=2)


@pytest.mark.parametrize("name", CASES)
def test_level_and_fields_of_a_delivery_are_documented(send: Send, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """`docs/reference/log-events.md` is generated from this description."""
    _, body, how, _ = CASES[name]
    send(body, **how)
    [line] = webhook_events(caplog)
    documented = COMPUTED_EVENTS["webhook.delivery"]
    assert set(line) - SHARED_FIELDS <= set(documented.fields)
    levels = {level for level, results in documented.levels.items() if f"`{line['result']}`" in results}
    assert line["level"] in (levels or {"warning"})


def test_delivery_is_refused_as_no_secret_without_secrets(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_secrets", list)
    before = counts().get("deliveries no_secret", 0)
    assert send(SYNC, secret="") == 401
    assert counts()["deliveries no_secret"] == before + 1


def test_secret_rotation_has_no_gap(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each step of the rotation, the deliveries of at least one subscription are accepted."""
    old, new = OLD_SECRET, SECRET
    steps = [([old], [old]), ([old], [old, new]), ([new, old], [old, new]), ([new, old], [new]), ([new], [new])]
    statuses = []
    for known, senders in steps:
        monkeypatch.setattr(endpoint, "_secrets", lambda known=known: known)
        statuses.append([send(delivery("bal_1"), secret=secret) for secret in senders])
    assert statuses == [[204], [204, 401], [204, 204], [204], [204]], (
        "Quiltt retries the 401, and the next step accepts it"
    )


@pytest.mark.parametrize("error", [OperationalError("x", None, Exception()), RuntimeError(), KeyError()])
def test_failed_commit_is_counted_as_unavailable(
    send: Send, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """The status is 503 for an unavailable database and for an unexpected error, which is logged with a traceback."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(flow, "ingest_events_and_resolve_payments", fail)
    monkeypatch.setattr(wiring.group_committer, "_is_available", lambda: False)
    before = counts()
    assert send(delivery("bal_1")) == 503
    after = counts()
    assert after["deliveries unavailable"] == before.get("deliveries unavailable", 0) + 1
    assert after.get("events balance") == before.get("events balance")
    *internal, line = webhook_events(caplog)
    assert (line["result"], line["level"], line["error"]) == ("unavailable", "error", type(error).__name__)
    assert [line["event"] for line in internal] == (
        [] if isinstance(error, OperationalError) else ["webhook.internal_error"]
    )


def test_flood_is_logged_once_per_second_and_result(caplog: pytest.LogCaptureFixture) -> None:
    """A line has the number of suppressed lines. The counters are exact."""
    now = [0.0]
    counters = DeliveryCounters(lambda: now[0])
    before = counts().get("deliveries mismatch", 0)
    for now[0] in (0.0, 0.1, 0.9, 0.95, 1.1, 1.2, 5.0):
        counters.count_delivery_and_log_sampled("mismatch", status=401)
    counters.count_delivery_and_log_sampled("stale", status=401)
    assert [(line["result"], line["suppressed"]) for line in webhook_events(caplog)] == [
        ("mismatch", 0),
        ("mismatch", 3),
        ("mismatch", 1),
        ("stale", 0),
    ]
    assert counts()["deliveries mismatch"] == before + 7
