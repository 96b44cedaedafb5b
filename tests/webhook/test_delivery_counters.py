"""What is counted at the door, and what is told of it: each delivery once, and nothing of what was in it."""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import REGISTRY
from sqlalchemy.exc import OperationalError

from config.settings import Settings
from tests.webhook.conftest import OLD_SECRET, SECRET, delivery, sign
from webhook import endpoint
from webhook.delivery_counters import DeliveryCounters
from webhook.events import MAX_BODY_BYTES
from worker import flow
from worker.flow import FollowUp

Send = Callable[..., int]
PRIVATE = "Ada Lovelace"


def counts() -> dict[str, float]:
    """All that the door counts, by metric and result; what is nought is left out."""
    found = {}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            if sample.name in ("payready_webhook_deliveries_total", "payready_webhook_events_total") and sample.value:
                found[f"{metric.name.removeprefix('payready_webhook_')} {sample.labels['result']}"] = sample.value
    return found


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Send:
    """Sends a delivery to the application itself; what it would keep is kept nowhere."""
    chosen = Settings(webhook_secrets=(SECRET, OLD_SECRET))
    monkeypatch.setattr(endpoint, "settings", lambda: chosen)
    monkeypatch.setattr(endpoint, "_secrets", lambda: (SECRET, OLD_SECRET))
    monkeypatch.setattr(endpoint, "runtime", lambda: None)
    monkeypatch.setattr(endpoint, "dispatch_without_callbacks", lambda _: None)
    monkeypatch.setattr(flow, "ingest_events", lambda *_: FollowUp())
    monkeypatch.setattr(endpoint, "delivery_counters", DeliveryCounters())
    caplog.set_level(logging.DEBUG)

    def send(
        body: bytes, *, secret: str = SECRET, age_s: int = 0, parts: int = 1, leave: bool = False, **headers: str
    ) -> int:
        timestamp = str(int(time.time()) - age_s)
        given = {"quiltt-timestamp": timestamp, "quiltt-signature": sign(body, timestamp, secret)} | {
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
        return call([(name.encode(), value.encode()) for name, value in given.items()], messages)

    return send


def call(headers: list[tuple[bytes, bytes]], messages: list[dict[str, Any]]) -> int:
    """Call the application; the status."""
    answers: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        answers.append(message)

    scope = {"type": "http", "method": "POST", "path": "/webhooks/quiltt", "headers": headers}
    asyncio.run(endpoint.app(scope, receive, send))
    return int(answers[0]["status"])


ONE_ODD = b'{"type": "balance.created", "record": {"name": "Ada Lovelace"}}'
SYNC = delivery("bal_1", source="SYNC")
PROFILE = b'{"events": [{"type": "profile.updated", "record": {"name": "Ada Lovelace"}}]}'
BROKEN = PROFILE.replace(b'"profile.updated"', b'"connection.disconnected", "at": "2026-11-22T12:00:00Z"').replace(
    b'"name"', b'"id": "conn_1", "name"'
)
MIXED = b'{"events": [%s, %s, {"type": "profile.created", "record": {"name": "Ada Lovelace"}}]}' % (
    ONE_ODD,
    json.dumps(json.loads(delivery("bal_1"))["events"][0]).encode(),
)
CASES: dict[str, tuple[int, bytes, dict[str, Any], dict[str, float]]] = {
    "routine": (204, SYNC, {}, {"events routine": 1}),
    "routine, of another type": (204, PROFILE, {}, {"events routine": 1}),
    "routine, by the secret from before": (204, SYNC, {"secret": OLD_SECRET}, {"events routine": 1}),
    "routine, in pieces": (204, SYNC, {"parts": 7}, {"events routine": 1}),
    "balance": (204, delivery("bal_1", "bal_2"), {}, {"events balance": 2}),
    "connection": (204, BROKEN, {}, {"events connection": 1}),
    "quarantined": (204, MIXED, {}, {"events balance": 1, "events quarantined": 1, "events routine": 1}),
    "stale": (401, delivery("bal_1"), {"age_s": 400}, {}),
    "stale, from the future": (401, delivery("bal_1"), {"age_s": -400}, {}),
    "mismatch": (401, PROFILE, {"secret": "whsec_of_somebody_else"}, {}),
    "mismatch, and old": (401, PROFILE, {"secret": "whsec_of_somebody_else", "age_s": 400}, {}),
    "missing": (401, PROFILE, {"quiltt_signature": ""}, {}),
    "malformed": (401, PROFILE, {"quiltt_timestamp": "+1"}, {}),
    "malformed, not ASCII": (401, PROFILE, {"quiltt_signature": "é" * 43 + "="}, {}),
    "content_type": (415, PROFILE, {"content_type": "text/plain"}, {}),
    "invalid_envelope": (400, PROFILE[:-1], {}, {}),
    "invalid_json": (400, PROFILE[:-2] + b",Ada Lovelace]}", {}, {"events invalid_json": 1, "events routine": 1}),
    "too_large": (413, PROFILE.ljust(MAX_BODY_BYTES + 1), {}, {}),
    "too_large, in pieces": (413, PROFILE.ljust(9 * MAX_BODY_BYTES), {"parts": 9}, {}),
    "client_disconnected": (400, PROFILE, {"leave": True}, {}),
    "client_disconnected, before it began": (400, b"", {"leave": True}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_each_delivery_is_counted_once_by_what_became_of_it(
    send: Send, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A stale one, which Quiltt did sign, apart from a forged one; one line in the log, with nothing of the body."""
    status, body, how, events = CASES[name]
    before = counts()
    assert send(body, **how) == status
    counted = {key: value - before.get(key, 0) for key, value in counts().items() if value != before.get(key, 0)}
    result = name.split(",", maxsplit=1)[0]
    assert counted == {f"deliveries {result}": 1, **events}
    [line] = [record.getMessage() for record in caplog.records if record.name.startswith("webhook")]
    assert PRIVATE not in line


def test_without_a_secret_all_are_counted_as_such(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """And refused."""
    monkeypatch.setattr(endpoint, "_secrets", list)
    before = counts().get("deliveries no_secret", 0)
    assert send(SYNC, secret="") == 401
    assert counts()["deliveries no_secret"] == before + 1


def test_a_secret_is_rotated_without_a_gap(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of steps that docs/howto/monitor.md gives: at each, some subscription's deliveries are all taken."""
    old, new = OLD_SECRET, SECRET
    steps = [([old], [old]), ([old], [old, new]), ([new, old], [old, new]), ([new, old], [new]), ([new], [new])]
    answers = []
    for known, senders in steps:
        monkeypatch.setattr(endpoint, "_secrets", lambda known=known: known)
        answers.append([send(delivery("bal_1"), secret=secret) for secret in senders])
    assert answers == [[204], [204, 401], [204, 204], [204], [204]], "the 401 is sent again, and then taken"


@pytest.mark.parametrize("error", [OperationalError("x", None, Exception()), RuntimeError(), KeyError()])
def test_what_could_not_be_kept_is_counted_and_sent_again(
    send: Send, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whatever the reason, also one that nobody thought of."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(flow, "ingest_events", fail)
    monkeypatch.setattr(endpoint.group_committer, "_is_available", lambda: False)
    before = counts()
    assert send(delivery("bal_1")) == 503
    after = counts()
    assert after["deliveries unavailable"] == before.get("deliveries unavailable", 0) + 1
    assert after.get("events balance") == before.get("events balance")


def test_a_flood_is_told_in_a_line_a_second(caplog: pytest.LogCaptureFixture) -> None:
    """Which says how many it stands for; another reason has a line of its own, and the counters have all."""
    now = [0.0]
    tally = DeliveryCounters(lambda: now[0])
    before = counts().get("deliveries mismatch", 0)
    for now[0] in (0.0, 0.1, 0.9, 0.95, 1.1, 1.2, 5.0):
        tally.count_delivery("mismatch", "refused with 401")
    tally.count_delivery("stale", "refused with 401")
    assert [record.getMessage() for record in caplog.records] == [
        "delivery mismatch: refused with 401",
        "delivery mismatch: refused with 401 (and 3 more before it)",
        "delivery mismatch: refused with 401 (and 1 more before it)",
        "delivery stale: refused with 401",
    ]
    assert counts()["deliveries mismatch"] == before + 7
