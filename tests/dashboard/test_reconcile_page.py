"""The upload of an invoice: shown before it is applied, and applied only as shown, with its evidence."""

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from dashboard.access.users import User
from dashboard.pages import reconcile_page
from tests.cli.conftest import LedgerBuilder
from worker.ledger import audit
from worker.ledger.engine import read_snapshot
from worker.rules.pricing import EntryState
from worker.runtime import Runtime

pytestmark = pytest.mark.slow

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
BY_CALL = b"""Account;Called at;Fee
acct_a;22.11.2026 13:00:04;0,10
acct_b;22.11.2026 13:00:05;0,10
Total;;0,20
"""
HOSTILE = "<script>alert(1)</script>\u202e"


@pytest.fixture
def ledger(runtime: Runtime) -> LedgerBuilder:
    """A posted and a pending call, in December."""
    runtime.clock = lambda: datetime(2026, 12, 3, tzinfo=UTC)
    built = LedgerBuilder(runtime.settings.database_url, runtime.engine)
    built.call("ref_a", "acct_a", EntryState.POSTED, NOON + timedelta(seconds=4))
    built.call("ref_b", "acct_b", None, NOON + timedelta(seconds=5))
    return built


def _token(client: httpx.Client) -> str:
    return client.get("/fees/reconcile").text.split('name="csrf_token" value="')[1].split('"')[0]


def _upload(client: httpx.Client, data: bytes = BY_CALL, *, name: str = "invoice.csv", **fields: str) -> httpx.Response:
    form = {"csrf_token": _token(client), "month": "2026-11", "time_zone": "Europe/Berlin", **fields}
    return client.post("/fees/reconcile", data=form, files={"invoice": (name, data)})


def _audited(runtime: Runtime) -> list[tuple[str, Any, str | None]]:
    with read_snapshot(runtime.engine) as tx:
        return [(entry.action, entry.detail, entry.result) for entry in audit.newest_entries(tx, limit=10)]


def _digest(page: httpx.Response) -> str:
    return page.text.split('name="digest" value="')[1].split('"')[0]


def test_invoice_is_shown_as_understood_and_changes_nothing(
    operator: httpx.Client, runtime: Runtime, ledger: LedgerBuilder
) -> None:
    before = ledger.entries()
    page = _upload(operator)
    assert page.status_code == 200
    assert '<h2 id="understood">First lines as understood</h2>' in page.text
    assert "2026-11-22 12:00:04Z" in page.text
    assert "applying the invoice would post 1 pending call" in page.text
    assert "time_zone = &#34;Europe/Berlin&#34;" in page.text
    assert ledger.entries() == before
    assert _audited(runtime) == []


def test_shown_invoice_is_applied_once_with_its_evidence(
    operator: httpx.Client, runtime: Runtime, ledger: LedgerBuilder
) -> None:
    digest = _digest(_upload(operator))
    for _ in range(2):
        response = _upload(operator, digest=digest)
        assert response.status_code == 303
    assert "The invoice was applied." in operator.get(response.headers["location"]).text
    ((_, state, evidence),) = [entry for entry in ledger.entries() if entry[2].get("name")]
    assert state == "posted"
    assert (evidence["name"], evidence["digest"], evidence["line"]) == ("invoice.csv", digest, 3)
    again, first = _audited(runtime)
    assert first == (
        "invoice.apply",
        {"file": "invoice.csv", "month": "2026-11", "currency": "USD"},
        "1 pending call posted, 0 voided, with the invoice as evidence",
    )
    assert again[2] == "0 pending calls posted, 0 voided, with the invoice as evidence"


def test_another_file_than_the_shown_one_is_not_applied(
    operator: httpx.Client, runtime: Runtime, ledger: LedgerBuilder
) -> None:
    before, digest = ledger.entries(), _digest(_upload(operator))
    response = _upload(operator, BY_CALL.replace(b"0,20", b"0,20 "), digest=digest)
    assert response.status_code == 400
    assert "this is another file than the one that was compared" in response.text
    assert (ledger.entries(), _audited(runtime)) == (before, [])


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"month": "2026-13"}, "month: must be a month such as 2026-11"),
        ({"currency": "usd"}, "currency: "),
        ({"total": "1,5"}, "total: must be a decimal"),
        ({"total": "9.99"}, "9.99"),
        ({"tolerance_s": "-1"}, "tolerance s: "),
        ({"header_row": "x"}, "header row: "),
        ({"date_style": HOSTILE}, "date style: "),
        ({"encoding": HOSTILE}, "encoding"),
        ({"profile": "x = ["}, "the profile is not TOML"),
        ({"profile": "x = " + "[" * 5000}, "the profile is not TOML"),
        ({"account_column": HOSTILE}, "column"),
    ],
)
def test_wrong_field_is_named_and_the_others_are_kept(
    operator: httpx.Client, ledger: LedgerBuilder, fields: dict[str, str], problem: str
) -> None:
    response = _upload(operator, BY_CALL, name="x.csv", **fields)
    assert response.status_code == 400
    alert = response.text.split('role="alert">')[1].split("</p>")[0]
    assert problem in alert
    assert 'value="Europe/Berlin"' in response.text
    assert "<script>alert" not in response.text


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "choose a file"),
        (b"%PDF-1.7", "a PDF file"),
        (b"PK\x03\x04broken", ""),
        (b"\x00\xff" * 500, ""),
    ],
)
def test_hostile_file_is_refused_with_a_sentence(
    operator: httpx.Client, ledger: LedgerBuilder, data: bytes, problem: str
) -> None:
    response = _upload(operator, data)
    assert response.status_code == 400
    assert problem in response.text.split('role="alert">')[1].split("</p>")[0]


def test_file_with_a_line_of_many_columns_is_refused_without_reading_them(
    operator: httpx.Client, ledger: LedgerBuilder
) -> None:
    response = _upload(operator, b"," * 100_000, delimiter=",")
    assert response.status_code == 400
    assert "more than 1000 columns" in response.text


def test_hostile_names_and_texts_are_escaped(operator: httpx.Client, ledger: LedgerBuilder) -> None:
    page = _upload(operator, BY_CALL.replace(b"acct_b", b"<script>alert(1)</script>"), name=HOSTILE)
    assert page.status_code == 200
    assert page.text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\u202e" in page.text
    assert "<script>alert" not in page.text


@pytest.mark.parametrize(("output", "kind"), [("html", "text/html"), ("csv", "text/csv")])
def test_report_can_be_downloaded(operator: httpx.Client, ledger: LedgerBuilder, output: str, kind: str) -> None:
    response = _upload(operator, output=output)
    assert response.headers["content-type"].startswith(kind)
    assert response.headers["content-disposition"].startswith("attachment; ")
    assert "acct_b" in response.text


def test_month_that_is_not_over_is_not_applied(operator: httpx.Client, runtime: Runtime, ledger: LedgerBuilder) -> None:
    """The refusal is audited: the user asked for it."""
    digest = _digest(_upload(operator))
    runtime.clock = lambda: datetime(2026, 11, 30, tzinfo=UTC)
    response = _upload(operator, digest=digest)
    assert response.status_code == 400
    assert "2026-11 is not over" in response.text
    assert [result for _, _, result in _audited(runtime)] == ["failed: InvoiceError"]


def test_large_or_concurrent_upload_is_refused(
    operator: httpx.Client, ledger: LedgerBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reconcile_page._one_invoice_at_a_time:
        assert _upload(operator).status_code == 503
    monkeypatch.setattr(reconcile_page, "MAX_UPLOAD_BYTES", 10)
    assert _upload(operator).status_code == 413
    monkeypatch.setattr(reconcile_page, "MAX_FORM_BYTES", 0)
    assert _upload(operator).status_code == 413


def test_viewer_may_not_upload(operator: httpx.Client, ledger: LedgerBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    token = _token(operator)
    monkeypatch.setattr(User, "is_operator", property(lambda _: False))
    page = operator.get("/fees/reconcile").text
    assert 'type="file"' not in page
    form = {"csrf_token": token, "month": "2026-11"}
    assert operator.post("/fees/reconcile", data=form, files={"invoice": ("x.csv", BY_CALL)}).status_code == 403
