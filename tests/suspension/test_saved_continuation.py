"""The saved continuation: plain JSON with a version, which later releases read and earlier ones reject."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from celery import Celery, chain, chord, group
from celery.app.task import Context
from sqlalchemy import JSON, bindparam, text

from tasks import suspension
from tests.support.system import System, eventually
from tests.suspension.primitive_kit import Kit
from tests.suspension.primitive_runs import Received, new_account_id, send_balance

VERSION_1 = Path(__file__).with_name("continuation_v1.json")
"""What the first release saves: one of every part. An id is the name of its task."""


@pytest.fixture
def app() -> Celery:
    """Return an app with a task that is suspended. It sends nothing."""
    app = Celery("suspended", set_as_current=False)
    app.task(_nothing, name="payments.initiate", shared=False)
    return app


def _nothing() -> None:
    pass


def request(**fields: Any) -> Context:
    """Return the request of a running task."""
    return Context({"id": "suspended", "task": "payments.initiate", "delivery_info": {}, **fields})


def ids_in(continuation: Any) -> list[str]:
    """Return the ids of all messages that the continuation will send."""
    if isinstance(continuation, list):
        return [found for part in continuation for found in ids_in(part)]
    if not isinstance(continuation, dict):
        return []
    own = [continuation["options"]["task_id"]] if "task_id" in continuation.get("options", {}) else []
    return own + [found for part in continuation.values() for found in ids_in(part)]


def test_continuation_is_plain_json_with_a_version(app: Celery) -> None:
    """Types that JSON lacks have the encoding of Celery messages and are restored."""
    values = [datetime(2100, 1, 1, tzinfo=UTC), Decimal("1.10"), UUID(int=7), b"bytes"]
    continuation = suspension.assign_task_ids_and_make_continuation(
        request(callbacks=[app.signature("ledger.note", args=values)])
    )
    assert continuation["version"] == suspension.VERSION == 1
    assert json.loads(json.dumps(continuation)) == continuation
    with suspension._resumed(app, continuation) as (_, resumed):
        assert resumed.callbacks[0]["args"] == values


def test_group_index_zero_is_saved(app: Celery) -> None:
    """A chord orders its results by it."""
    with suspension._resumed(
        app, suspension.assign_task_ids_and_make_continuation(request(group="g", group_index=0))
    ) as (
        _,
        resumed,
    ):
        assert (resumed.group, resumed.group_index) == ("g", 0)


def test_every_future_message_has_its_id_in_the_continuation(app: Celery) -> None:
    """Also members of groups, headers and bodies of chords, and callbacks of callbacks."""
    note = app.signature("ledger.note")
    deep = chord(
        [note.clone(), group(note.clone(), note.clone(), app=app)],
        chain(note.clone(), note.clone(), app=app),
        app=app,
    )
    linked = note.clone()
    linked.link(note.clone())
    linked.link_error(note.clone())
    continuation = suspension.assign_task_ids_and_make_continuation(
        request(callbacks=[deep, linked], errbacks=[note.clone()], chain=[note.clone()])
    )
    found = ids_in(continuation)
    assert len(found) == len(set(found)) == 12  # ten tasks, and the chord and the group as groups
    assert continuation["callbacks"][0]["kwargs"]["body"]["options"] == {}  # a chain has the id of its last task


def test_given_ids_and_arguments_are_unchanged(app: Celery) -> None:
    """A signature among a callback's arguments is data."""
    data = app.signature("ledger.other")
    callback = app.signature("ledger.note", args=(data,), kwargs={"then": data}, task_id="chosen")
    [saved] = suspension.assign_task_ids_and_make_continuation(request(callbacks=[callback]))["callbacks"]
    assert saved["options"]["task_id"] == "chosen"
    assert saved["args"] == [json.loads(json.dumps(data))]
    assert saved["kwargs"]["then"]["options"] == {}


def test_continuation_of_a_later_release_is_rejected(app: Celery) -> None:
    """It may have parts that this release would ignore."""
    continuation = suspension.assign_task_ids_and_make_continuation(request()) | {"version": 2}
    with pytest.raises(
        suspension.UnsupportedContinuationVersion,
        match="the continuation has version 2, this release supports up to 1",
    ):
        suspension.resume_with_result(app, continuation, {})
    with pytest.raises(suspension.UnsupportedContinuationVersion):
        suspension.resume_with_error(app, continuation, ValueError())


def replace_continuation(payready: System, payment_id: str, continuation: dict[str, Any]) -> None:
    """Replace the saved continuation, as if another release had saved it."""
    update = text("UPDATE outcome_delivery SET continuation = :continuation WHERE payment_id = :id").bindparams(
        bindparam("continuation", type_=JSON)
    )
    with payready.engine.begin() as connection:
        connection.execute(update, {"continuation": continuation, "id": payment_id})


def test_outcome_with_unsupported_continuation_stays_undelivered(
    payready: System, service: Celery, received: Received
) -> None:
    """The payment is resolved, and the log has the reason. A later release delivers the outcome."""
    kit = Kit(service, "payments.initiate", "payments", new_account_id(), "unknown-continuation", fails=False)
    result = kit.pay(link=kit.note("next")).apply_async()
    query = "SELECT continuation, due_at, delivered_at FROM outcome_delivery WHERE payment_id = :id"
    [saved] = eventually(lambda: payready.rows(query, id=kit.payments[0]))
    replace_continuation(payready, kit.payments[0], saved["continuation"] | {"version": 99})
    send_balance(payready, kit.account_id)
    log = payready.processes.log_of("worker")
    eventually(lambda: "the continuation has version 99, this release supports up to 1" in log.read_text())
    [delivery] = payready.rows(query, id=kit.payments[0])
    assert payready.payment(kit.payments[0])["state"] == "released"
    assert (delivery["due_at"] is not None, delivery["delivered_at"], result.state) == (True, None, "WAITING")
    assert not received[kit.tag]
    replace_continuation(payready, kit.payments[0], saved["continuation"])
    with payready.engine.begin() as connection:
        connection.execute(
            text("UPDATE outcome_delivery SET due_at = now() WHERE payment_id = :id"), {"id": kit.payments[0]}
        )
    assert result.get(timeout=15)["state"] == "released"
    eventually(lambda: [note["mark"] for note in received[kit.tag]] == ["next"])


@pytest.mark.parametrize(
    ("outcome", "called"),
    [
        ("released", {"link", "chain-of-link", "chain-of-link-2", "chain", "chord-body"}),
        ("failed", {"errback", "errback-2", "chord-errback"}),
    ],
)
def test_continuation_of_version_1_is_resumed(
    payready: System, service: Celery, received: Received, outcome: str, called: set[str]
) -> None:
    """The stored continuation sends all callbacks with their ids, relations and stamps."""
    tag = f"v1-{outcome}"
    kit = Kit(service, "payments.initiate", "payments", new_account_id(), tag, fails=outcome == "failed")
    kit.pay().apply_async()
    query = "SELECT continuation FROM outcome_delivery WHERE payment_id = :id"
    eventually(lambda: payready.rows(query, id=kit.payments[0]))
    continuation = json.loads(VERSION_1.read_text().replace("TAG", tag))
    replace_continuation(payready, kit.payments[0], continuation)
    service.backend.set_chord_size(continuation["group"], 1)
    send_balance(payready, kit.account_id)
    eventually(lambda: {note["mark"] for note in received[tag]} == called)
    task: Any = service.AsyncResult(continuation["id"])
    assert task.state == {"released": "SUCCESS", "failed": "FAILURE"}[outcome]
    for note in received[tag]:
        assert note["id"] == f"{tag}-{note['mark']}"
        assert note["root_id"] == ("root-" + tag if not note["mark"].startswith("chord") else note["root_id"])
        assert note["stamps"] == ({"order": "order-7"} if note["mark"] in ("chain", "errback") else {})


def test_stored_continuation_has_every_field(app: Celery) -> None:
    """A new field of the continuation is added to the fixture, or to a fixture of a new version."""
    all_fields: dict[str, Any] = dict.fromkeys(suspension._SAVED_FIELDS, "x")
    all_fields |= {name: [] for name in ("callbacks", "errbacks", "chain")} | {"chord": None}
    saved = suspension.assign_task_ids_and_make_continuation(request(**all_fields | {"delivery_info": {"priority": 3}}))
    assert set(saved) | {"chord"} == set(json.loads(VERSION_1.read_text()))


def test_resumed_task_is_the_current_task(app: Celery) -> None:
    """Each sent message becomes its child."""
    seen: list[Any] = [app.current_worker_task]
    with suspension._resumed(app, suspension.assign_task_ids_and_make_continuation(request(root_id="root"))) as (
        task,
        resumed,
    ):
        seen.append(app.current_worker_task)
        assert task.request is resumed
        assert (resumed.id, resumed.root_id, resumed.children) == ("suspended", "root", [])
    assert [*seen, app.current_worker_task] == [None, app.tasks["payments.initiate"], None]
