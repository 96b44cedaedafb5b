"""The pages of dead letters and of the quarantine: read, requeue or replay, delete; each action asks and is audited."""

import json
from base64 import b64encode
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from redis import Redis

from dashboard.list_pages import PAGE_SIZE
from worker.ledger import audit, dead_letters, quarantine
from worker.ledger.engine import read_snapshot, transaction
from worker.quiltt.messages import UnparsedEvent
from worker.rules.unhandled_messages import DeadLetterReason, UnhandledMessage
from worker.runtime import Runtime

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
HOSTILE = "<script>alert(1)</script>\u202e'\"{{7*7}}"
MESSAGE = json.dumps(
    {
        "body": b64encode(f"[[{HOSTILE!r}], {{}}, {{}}]".encode()).decode(),
        "headers": {"id": "task-1", "task": "payments.initiate"},
        "properties": {"body_encoding": "base64"},
    }
).encode()

READABLE = {
    "id": "evt_1",
    "type": "balance.created",
    "record": {
        "id": "bal_1",
        "accountId": "acct_1",
        "at": "2026-11-22T12:00:00Z",
        "source": "REFRESH",
        "available": 1,
        "current": None,
        "limit": None,
    },
}
"""An event that this version can parse."""


def _letter(
    number: int = 0, message: bytes = MESSAGE, reason: DeadLetterReason = DeadLetterReason.WORKER_DIED
) -> UnhandledMessage:
    return UnhandledMessage(
        queue="payments",
        reason=reason,
        detail=HOSTILE,
        message=message + b" " * number,
        task_id=HOSTILE,
        task_name=HOSTILE,
    )


@pytest.fixture
def redis(valkey_url: str) -> Iterator["Redis"]:
    with Redis.from_url(valkey_url) as client:
        client.delete("payments")
        yield client
        client.delete("payments")


def _store(runtime: Runtime, *messages: UnhandledMessage) -> list[str]:
    with transaction(runtime.engine) as tx:
        return dead_letters.store(tx, messages, NOON)


def _remaining(runtime: Runtime) -> list[str]:
    with read_snapshot(runtime.engine) as tx:
        return dead_letters.ids_after(tx, after_id="", reason=None, limit=1000)


def _quarantine(runtime: Runtime, *events: bytes, at: datetime = NOON) -> list[str]:
    with transaction(runtime.engine) as tx:
        quarantine.insert_events(tx, [UnparsedEvent(raw=raw, reason=HOSTILE) for raw in events], at)
        return [event.quarantine_id for event in quarantine.newest_events(tx, 1000)]


def _audited(runtime: Runtime) -> list[tuple[str, str, str | None]]:
    with read_snapshot(runtime.engine) as tx:
        return [(entry.action, entry.subject, entry.result) for entry in audit.newest_entries(tx, limit=10)]


def _token(page: httpx.Response) -> str:
    return page.text.split('name="csrf_token" value="')[1].split('"')[0]


def _confirm_and_post(client: httpx.Client, path: str, **selected: str | list[str]) -> httpx.Response:
    """Open the page that asks, and send its form."""
    page = client.get(path, params=selected)
    assert page.status_code == 200
    form = {"csrf_token": _token(page), **selected}
    return client.post(path.replace("/confirm/", "/actions/"), data=form)


def test_hostile_dead_letter_is_shown_as_text(operator: httpx.Client, runtime: Runtime) -> None:
    (stored,) = _store(runtime, _letter())
    for path in ("/dead-letters", f"/dead-letters/{stored}"):
        page = operator.get(path)
        assert page.status_code == 200
        assert stored in page.text
        assert "&lt;script&gt;alert(1)" in page.text
        assert "\\u202e" in page.text
        assert "<script>alert" not in page.text
        assert "{{7*7}}" in page.text
    assert "Body, decoded" in operator.get(f"/dead-letters/{stored}").text
    for unknown in ("x" * 500, "%00", "..%2f..%2fx", "%F0%9F%92%A9"):
        assert operator.get(f"/dead-letters/{unknown}").status_code == 404
        assert operator.get(f"/quarantine/{unknown}").status_code == 404


def test_dead_letters_are_listed_in_pages_by_key(operator: httpx.Client, runtime: Runtime) -> None:
    """All have the same time, so their ids order them."""
    stored = _store(runtime, *(_letter(number) for number in range(60)))
    first = operator.get("/dead-letters").text
    target = first.split('rel="next"')[0].rsplit('href="', 1)[1].split('"')[0].replace("&amp;", "&")
    second = operator.get(target).text
    on_first, on_second = ([each for each in stored if each in page] for page in (first, second))
    assert (len(on_first), len(on_second)) == (50, 10)
    assert {*on_first, *on_second} == set(stored)
    assert operator.get("/dead-letters?before=x").status_code == 400
    assert operator.get("/dead-letters?reason=x").status_code == 400


def test_one_row_is_asked_about_in_the_singular(operator: httpx.Client, runtime: Runtime) -> None:
    (stored,), (event,) = _store(runtime, _letter()), _quarantine(runtime, b"not json")
    assert "Delete 1 dead letter?" in operator.get("/dead-letters/confirm/delete", params={"id": stored}).text
    assert "Replay 1 event?" in operator.get("/quarantine/confirm/replay", params={"id": event}).text


def test_requeued_letter_is_in_its_queue(operator: httpx.Client, runtime: Runtime, redis: "Redis") -> None:
    stored, other = _store(runtime, _letter(), _letter(1))
    response = _confirm_and_post(operator, "/dead-letters/confirm/requeue", id=stored)
    assert response.status_code == 303
    assert redis.lrange(f"{runtime.settings.name_prefix}payments", 0, -1) == [MESSAGE]
    assert _remaining(runtime) == [other]
    assert _audited(runtime) == [("dead_letter.requeue", stored, "changed 1")]
    assert "Requeued: 1." in operator.get(response.headers["location"]).text


def test_letters_of_a_reason_are_requeued_or_refused(operator: httpx.Client, runtime: Runtime, redis: "Redis") -> None:
    too_long = _letter(message=b"[" * (dead_letters.MAX_MESSAGE_BYTES + 1))
    ids = _store(runtime, _letter(), too_long, _letter(1, reason=DeadLetterReason.UNREADABLE))
    response = _confirm_and_post(operator, "/dead-letters/confirm/requeue", reason="worker_died")
    assert response.headers["location"] == "/dead-letters?done=requeue&changed=1&refused=1"
    assert sorted(_remaining(runtime)) == sorted(ids[1:])
    ((_, subject, result),) = _audited(runtime)
    assert subject == "all with the reason worker_died"
    assert result is not None
    assert "only the first" in result


@pytest.mark.parametrize("action", ["delete", "requeue"])
def test_audit_has_each_id_of_a_reason(operator: httpx.Client, runtime: Runtime, redis: "Redis", action: str) -> None:
    """An entry has up to a page of ids, so that none is cut."""
    ids = _store(runtime, *(_letter(number) for number in range(PAGE_SIZE + 1)))
    response = _confirm_and_post(operator, f"/dead-letters/confirm/{action}", reason="worker_died")
    assert response.headers["location"] == f"/dead-letters?done={action}&changed={PAGE_SIZE + 1}&refused=0"
    with read_snapshot(runtime.engine) as tx:
        entries = audit.newest_entries(tx, limit=10)
    assert {entry.subject for entry in entries} == {"all with the reason worker_died"}
    assert [entry.result for entry in entries] == ["changed 1", f"changed {PAGE_SIZE}"]
    assert sorted(each for entry in entries for each in (entry.detail or {})["ids"].split(", ")) == sorted(ids)


def test_replay_without_broker_says_that_the_sweep_applies_the_balances(
    operator: httpx.Client, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stored,) = _quarantine(runtime, json.dumps(READABLE).encode())
    runtime.settings = runtime.settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    response = _confirm_and_post(operator, "/quarantine/confirm/replay", id=stored)
    assert response.headers["location"] == "/quarantine?applied=1&not_enqueued=1"
    page = " ".join(operator.get(response.headers["location"]).text.split())
    assert "Not enqueued: 1 event." in page
    assert "The sweep applies them." in page
    assert _audited(runtime) == [("quarantine.replay", stored, "applied 1, not_enqueued 1")]


def test_selected_letters_are_deleted(operator: httpx.Client, runtime: Runtime) -> None:
    ids = _store(runtime, *(_letter(number) for number in range(3)))
    _confirm_and_post(operator, "/dead-letters/confirm/delete", id=ids[:2])
    assert _remaining(runtime) == ids[2:]
    ((action, _, result),) = _audited(runtime)
    assert (action, result) == ("dead_letter.delete", "changed 2")


def test_audit_has_each_id_of_a_full_page(operator: httpx.Client, runtime: Runtime) -> None:
    ids = _store(runtime, *(_letter(number) for number in range(PAGE_SIZE)))
    _confirm_and_post(operator, "/dead-letters/confirm/delete", id=ids)
    with read_snapshot(runtime.engine) as tx:
        [entry] = audit.newest_entries(tx, limit=2)
    assert entry.subject == "50 selected"
    assert entry.detail == {"ids": ", ".join(ids)}


@pytest.mark.parametrize("kind", ["dead-letters", "quarantine"])
def test_nothing_happens_without_a_token_or_a_selection(operator: httpx.Client, runtime: Runtime, kind: str) -> None:
    (stored,) = _store(runtime, _letter())
    (event,) = _quarantine(runtime, b"{}")
    chosen = stored if kind == "dead-letters" else event
    page = operator.get(f"/{kind}/confirm/delete", params={"id": chosen})
    assert operator.post(f"/{kind}/actions/delete", data={"id": chosen}).status_code == 403
    assert operator.post(f"/{kind}/actions/delete", data={"csrf_token": _token(page)}).status_code == 400
    assert operator.get(f"/{kind}/confirm/delete").status_code == 400
    assert operator.get(f"/{kind}/confirm/drop", params={"id": chosen}).status_code == 404
    assert _remaining(runtime) == [stored]
    assert _quarantine(runtime) == [event]
    assert _audited(runtime) == []


def test_quarantined_event_is_shown_replayed_and_deleted(operator: httpx.Client, runtime: Runtime) -> None:
    (readable,) = _quarantine(runtime, json.dumps(READABLE).encode())
    (hostile,) = (each for each in _quarantine(runtime, HOSTILE.encode(), at=NOON + timedelta(1)) if each != readable)
    page = operator.get("/quarantine").text
    assert page.index(hostile) < page.index(readable)
    shown = operator.get(f"/quarantine/{hostile}").text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\u202e" in shown
    assert "<script>alert" not in shown + page
    response = _confirm_and_post(operator, "/quarantine/confirm/replay", id=[readable, hostile, "missing"])
    assert response.status_code == 303
    assert {*response.headers["location"].partition("?")[2].split("&")} == {
        "applied=1",
        "still_unparseable=1",
        "missing=1",
    }
    assert _quarantine(runtime) == [hostile]
    _confirm_and_post(operator, "/quarantine/confirm/delete", id=hostile)
    assert _quarantine(runtime) == []
    assert [action for action, _, _ in _audited(runtime)] == ["quarantine.delete", "quarantine.replay"]
    assert operator.get(f"/quarantine/{hostile}").status_code == 404


@pytest.mark.parametrize("path", ["/dead-letters", "/quarantine", "/fees", "/fees/pending"])
def test_page_is_shown_on_an_empty_ledger(operator: httpx.Client, path: str) -> None:
    assert operator.get(path).status_code == 200
