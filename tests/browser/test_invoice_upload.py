"""An invoice is compared and applied in the browser, and no repetition of a form applies it again."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, Page

from tests.browser.live_dashboard import OPERATOR, PASSWORD, VIEWER, Dashboard
from tests.browser.watched_browser import serious_findings, watched
from tests.cli.conftest import LedgerBuilder
from worker.ledger import audit
from worker.ledger.engine import read_snapshot
from worker.rules.pricing import EntryState

MONTH, NOON = "2026-07", datetime(2026, 7, 14, 12, tzinfo=UTC)
"""The ledger of these tests has no other calls of it: applying an invoice voids pending calls of its month."""
INVOICE = "Account,Called at (UTC),Fee\nacct_a,2026-07-14 12:00:01,0.10\nacct_b,2026-07-14 12:00:02,0.10\n"
POSTED, OPEN, UNBILLED, OTHER_MONTH = "ref_jul_a", "ref_jul_b", "ref_jul_c", "ref_aug_a"


@pytest.fixture(scope="module")
def ledger(dashboard: Dashboard) -> LedgerBuilder:
    """Calls: one that is posted, two that are pending, of which one is on the invoice, and one of another month."""
    built = LedgerBuilder(dashboard.system.database_url, dashboard.system.engine)
    built.call(POSTED, "acct_a", EntryState.POSTED, NOON + timedelta(seconds=1))
    built.call(OPEN, "acct_b", None, NOON + timedelta(seconds=2))
    built.call(UNBILLED, "acct_c", None, NOON + timedelta(seconds=3))
    built.call(OTHER_MONTH, "acct_d", None, NOON + timedelta(days=31))
    return built


@pytest.fixture
def invoice(tmp_path: Path) -> Path:
    file = tmp_path / "invoice.csv"
    file.write_text(INVOICE)
    return file


def entries(ledger: LedgerBuilder) -> list[tuple[str, str, Any]]:
    """Return the fee entries of the calls of these tests: call, state, and the line of the invoice."""
    return sorted(
        (call_id.removeprefix("call_").rsplit("_", 1)[0], state, evidence.get("line"))
        for call_id, state, evidence in ledger.entries()
        if call_id.startswith(("call_ref_jul", "call_ref_aug"))
    )


def audited(dashboard: Dashboard) -> Iterator[tuple[str, str | None]]:
    with read_snapshot(dashboard.system.engine) as tx:
        newest = audit.newest_entries(tx, limit=50)
    return ((entry.user_name, entry.result) for entry in reversed(newest) if entry.action == "invoice.apply")


def compare(page: Page, invoice: Path) -> None:
    page.locator("input[name=invoice]").set_input_files(invoice)
    page.locator("input[name=month]").fill(MONTH)
    page.locator("input[name=time_zone]").fill("UTC")
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("button", name="Apply the invoice").wait_for()


def test_invoice_is_shown_applied_once_and_audited(
    chromium: Browser, dashboard: Dashboard, ledger: LedgerBuilder, invoice: Path
) -> None:
    before = entries(ledger)
    applied = "1 pending call posted, 1 voided, with the invoice as evidence"
    again = "0 pending calls posted, 0 voided, with the invoice as evidence"
    with watched(chromium, dashboard.url) as window:
        window.log_in(OPERATOR, PASSWORD)
        page = window.open("/fees/reconcile")
        compare(page, invoice)
        assert "applying the invoice would post 1 pending call and void 1" in page.inner_text("main")
        assert serious_findings(page) == []
        assert (entries(ledger), list(audited(dashboard))) == (before, []), "a comparison changes nothing"

        page.locator("input[name=invoice]").set_input_files(invoice)
        page.get_by_role("button", name="Apply the invoice").dblclick()
        page.wait_for_url("**/fees/reconcile?applied")
        assert "The invoice was applied." in page.get_by_role("status").inner_text()
        changed = sorted([*before, (OPEN, "posted", 3), (UNBILLED, "void", None)])
        assert entries(ledger) == changed, "the call of another month stays pending"

        with pytest.raises(Error, match="ERR_CACHE_MISS"):  # the browser has no copy, and asks before it sends a form
            page.go_back()
        page.wait_for_url("chrome-error://chromewebdata/")
        assert entries(ledger) == changed
        compare(window.open("/fees/reconcile"), invoice)
        page.locator("input[name=invoice]").set_input_files(invoice)
        page.get_by_role("button", name="Apply the invoice").click()
        page.wait_for_url("**/fees/reconcile?applied")
        assert entries(ledger) == changed

        first, *others = audited(dashboard)
        assert first == (OPERATOR, applied)
        assert others
        assert set(others) == {(OPERATOR, again)}
        text = window.open("/audit").inner_text("main")
        assert applied in text
        assert "invoice.csv" in text
        assert window.take_problems() == []


def test_viewer_is_offered_no_upload(chromium: Browser, dashboard: Dashboard) -> None:
    with watched(chromium, dashboard.url) as window:
        window.log_in(VIEWER, PASSWORD)
        page = window.open("/fees/reconcile")
        assert page.locator("input[type=file]").count() == 0
        assert "Only an operator may upload an invoice" in page.inner_text("main")
