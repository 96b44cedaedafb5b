"""The audit: an entry before each action, one result, and no change of either."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError

from dashboard.access.users import Role, User
from dashboard.auditing import audited
from worker.ledger import audit
from worker.ledger.engine import open_engine, read_snapshot, transaction
from worker.runtime import Runtime

pytestmark = pytest.mark.slow

OLIVIA = User(name="olivia", role=Role.OPERATOR)
HOSTILE = ["<script>alert(1)</script>", "' OR 1=1 --", "\u202egnp", "a\x00b", "../../etc", "x" * 600, "{{7*7}}", "a\nb"]


def entries(runtime: Runtime, **filters: Any) -> list[audit.AuditEntry]:
    with read_snapshot(runtime.engine) as tx:
        return audit.newest_entries(tx, limit=1000, **filters)


def act(runtime: Runtime, subject: str = "pay_1", do: Callable[[], str] = lambda: "cancelled", **more: Any) -> str:
    result: str = audited(runtime, OLIVIA, action="payment.cancel", subject=subject, do=do, **more)
    return result


def test_action_begins_after_its_entry_and_ends_before_its_result(runtime: Runtime) -> None:
    during: list[audit.AuditEntry] = []

    def cancel() -> str:
        during.extend(entries(runtime))
        return "cancelled"

    assert act(runtime, do=cancel, detail={"reason": "asked", "count": 3}) == "cancelled"
    [(before,), (after,)] = during, entries(runtime)
    assert (before.result, before.ended_at) == (None, None)
    assert (after.user_name, after.action, after.subject) == ("olivia", "payment.cancel", "pay_1")
    assert (after.detail, after.result) == ({"reason": "asked", "count": 3}, "cancelled")
    assert after.ended_at is not None
    assert after.at == before.at <= after.ended_at


def test_failed_action_is_recorded_without_the_text_of_its_error(runtime: Runtime) -> None:
    def fail() -> str:
        raise ValueError("a secret of the test")

    with pytest.raises(ValueError, match="a secret"):
        act(runtime, do=fail)
    assert [entry.result for entry in entries(runtime)] == ["failed: ValueError"]


def test_interrupted_action_has_an_entry_without_a_result(runtime: Runtime) -> None:
    def interrupt() -> str:
        raise SystemExit

    with pytest.raises(SystemExit):
        act(runtime, do=interrupt)
    assert [entry.result for entry in entries(runtime)] == [None]


def test_no_action_is_done_without_its_entry(runtime: Runtime) -> None:
    away = replace(runtime, engine=open_engine("postgresql://payready@127.0.0.1:1/x", connections=1))
    with pytest.raises(OperationalError):
        act(away, do=lambda: pytest.fail("it must not be done"))


def test_action_stays_done_if_its_result_cannot_be_recorded(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OperationalError("", {}, Exception("gone"))

    monkeypatch.setattr(audit, "record_result", fail)
    assert act(runtime) == "cancelled"
    assert [entry.result for entry in entries(runtime)] == [None]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET user_name = 'mallory'",
        "DELETE FROM audit",
        "UPDATE audit_result SET result = 'nothing'",
        "DELETE FROM audit_result",
        "TRUNCATE audit, audit_result",
        "INSERT OR REPLACE INTO audit SELECT audit_id, at, 'mallory', action, subject, detail FROM audit",
        "INSERT OR REPLACE INTO audit_result SELECT audit_id, at, 'nothing' FROM audit_result",
    ],
)
def test_database_rejects_every_change(runtime: Runtime, statement: str) -> None:
    is_sqlite = runtime.engine.dialect.name == "sqlite"
    if (is_sqlite and "TRUNCATE" in statement) or (not is_sqlite and "REPLACE" in statement):
        pytest.skip("the database has no such statement")
    act(runtime)
    before = entries(runtime)
    with pytest.raises(DBAPIError, match="the audit is append-only"), runtime.engine.begin() as tx:
        tx.execute(text(statement))
    assert entries(runtime) == before


def test_action_has_one_result(runtime: Runtime) -> None:
    act(runtime)
    [entry] = entries(runtime)
    with pytest.raises(DBAPIError), transaction(runtime.engine) as tx:
        audit.record_result(tx, entry.audit_id, "another", runtime.clock())


def test_page_shows_actions_newest_first_and_filters(operator: httpx.Client, runtime: Runtime) -> None:
    for number in range(120):
        act(runtime, f"pay_{number % 2}_{number:03}")
    first = operator.get("/audit").text
    assert first.index("pay_1_119") < first.index("pay_0_118")
    assert first.count("payment.cancel") == 50
    second = operator.get("/audit?before=71").text
    assert "pay_1_069" in second
    assert "pay_0_070" not in second
    assert 'href="/audit?before=71"' in first
    last = operator.get("/audit?before=21").text
    assert (last.count("payment.cancel"), "Older actions" in last) == (20, False)
    only = operator.get("/audit", params={"subject": "pay_0_004", "user": "olivia"}).text
    assert only.count("payment.cancel") == 1
    assert "No action matches the filter" in operator.get("/audit?user=mallory").text


def test_viewer_sees_the_audit(viewer: httpx.Client) -> None:
    assert "No action." in viewer.get("/audit").text


@pytest.mark.parametrize("subject", HOSTILE)
def test_hostile_subject_is_shown_as_text_and_found(operator: httpx.Client, runtime: Runtime, subject: str) -> None:
    act(runtime, subject, detail={subject: subject})
    for page in (operator.get("/audit"), operator.get("/audit", params={"subject": subject, "user": ""})):
        assert page.status_code == 200
        assert page.text.count("payment.cancel") == 1
        assert not any(text in page.text for text in ("<script>alert", "\u202e", "\x00", ">49<"))


@pytest.mark.parametrize("before", ["x", "-1", "1.5", "9" * 30, "²", "' OR 1=1", "\x00"])
def test_bad_page_number_is_named(operator: httpx.Client, before: str) -> None:
    response = operator.get("/audit", params={"before": before, "subject": "pay_7"})
    assert response.status_code == 400
    assert "before: must be the number of an action" in response.text
    assert 'value="pay_7"' in response.text


def test_last_page_number_is_possible(operator: httpx.Client) -> None:
    assert operator.get("/audit", params={"before": str(2**63)}).status_code == 200


def test_duration_of_an_action_is_shown(operator: httpx.Client, runtime: Runtime) -> None:
    times = iter([runtime.clock(), runtime.clock() + timedelta(seconds=90)])
    act(replace(runtime, clock=lambda: next(times)))
    assert "after 1 min 30 s" in operator.get("/audit").text
