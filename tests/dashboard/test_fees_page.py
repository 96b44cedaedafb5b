"""The page Fees: its figures are those of `payready fees statement`, and it says what is missing."""

import csv
import io
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import httpx
import pytest
from typer.testing import CliRunner

from cli.main import app
from config.settings import settings
from dashboard import background_read
from dashboard.fee_days import FeeDays
from tests.cli.conftest import DIME, LedgerBuilder
from worker.ledger import statement_slices
from worker.ledger.engine import Tx, read_snapshot
from worker.ledger.statement_slices import DayStatement
from worker.rules.fee_caps import FeeCaps
from worker.rules.months import parse_month
from worker.rules.pricing import EntryState, Price
from worker.rules.states import PaymentState
from worker.runtime import Runtime

pytestmark = pytest.mark.slow

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
TEST, EUROS = replace(DIME, mode="TEST"), Price(per_call=Decimal("0.25"), currency="EUR", price_list="2026-11-22")
HOSTILE = "<script>alert(1)</script>\u202e'\"{{7*7}}" + "x" * 400


@pytest.fixture(autouse=True)
def wait_for_all_days(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages wait until all days are read, however busy the machine is."""
    monkeypatch.setattr(background_read, "PAGE_WAIT_S", 60)


@pytest.fixture
def ledger(runtime: Runtime) -> LedgerBuilder:
    """A ledger with calls of two months and currencies, shared and reused, in December."""
    runtime.clock = lambda: datetime(2026, 12, 3, tzinfo=UTC)
    built = LedgerBuilder(runtime.settings.database_url, runtime.engine)
    for number, (end, price, days) in enumerate(
        [(EntryState.POSTED, DIME, 0), (None, DIME, 1), (EntryState.VOID, TEST, 1), (EntryState.POSTED, EUROS, -21)]
    ):
        at = NOON + timedelta(days=days)
        built.call(f"ref_{number}", f"acct_{number}", end, at, price)
        for place in range(3):
            built.payment(f"pay_{number}_{place}", f"acct_{number}", at)
            built.resolve(
                f"pay_{number}_{place}", PaymentState.RELEASED, at, refresh_id=f"ref_{number}", reused=place == 2
            )
    built.call("ref_october", HOSTILE, EntryState.POSTED, NOON - timedelta(days=30), DIME)
    return built


@pytest.fixture
def statement(ledger: LedgerBuilder, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that runs `payready fees`."""
    monkeypatch.setenv("PAYREADY_DATABASE_URL", ledger.url)
    monkeypatch.setattr("cli.command_line.settings", settings.__wrapped__)
    for module in ("cli.statement_commands", "cli.pending_calls_command"):
        monkeypatch.setattr(f"{module}.utc_now", lambda: datetime(2026, 12, 3, tzinfo=UTC))
    return lambda *arguments: CliRunner().invoke(app, ["fees", *arguments]).stdout


@pytest.mark.parametrize("by", [(), ("--by", "day"), ("--by", "account")])
def test_csv_is_that_of_the_command_line(
    operator: httpx.Client, statement: Callable[..., str], by: tuple[str, ...]
) -> None:
    response = operator.get("/fees.csv", params={"month": "2026-11", "by": by[1] if by else "price"})
    assert response.text == statement("statement", "--month", "2026-11", "--csv", *by)
    assert response.text.count("\n") >= 3
    assert response.headers["content-type"].startswith("text/csv")
    assert response.headers["content-disposition"].startswith("attachment; filename=")


def test_figures_of_the_page_are_those_of_the_command_line(
    operator: httpx.Client, statement: Callable[..., str]
) -> None:
    page = operator.get("/fees?month=2026-11").text
    rows = csv.DictReader(io.StringIO(statement("statement", "--month", "2026-11", "--csv", "--by", "day")))
    for row in rows:
        assert f'<th scope="row" class="word">{row["day"]}</th><td class="number">{row["calls"]}</td>' in page
    printed = statement("statement", "--month", "2026-11", "--by", "day", "--compare").splitlines()
    sentences = [
        line for line in printed if line.startswith(("Calls of", "Mode", "Not all", "2 calls", "3 calls", "saved"))
    ]
    assert len(sentences) >= 5
    for sentence in sentences:
        assert f">{sentence}</p>" in page
    assert "final amount: 0.10 to 0.20 USD; 1 pending call is not decided yet" in page
    assert "still being read" not in page


def test_statement_of_test_calls_says_that_it_is_no_bill(operator: httpx.Client, ledger: LedgerBuilder) -> None:
    ledger.call("ref_dec", "acct_dec", EntryState.POSTED, datetime(2026, 12, 1, tzinfo=UTC), TEST)
    page = operator.get("/fees").text
    assert "<h1>Fees of 2026-12</h1>" in page
    assert '<p class="sentence">This is no bill: Quiltt bills calls of mode PRODUCTION only.</p>' in page
    assert "The period is not over" in page


def test_page_links_months_with_calls(operator: httpx.Client, ledger: LedgerBuilder) -> None:
    page = operator.get("/fees?month=2026-11").text
    assert [month for month in ("2026-12", "2026-11", "2026-10") if f'href="/fees?month={month}"' in page] == [
        "2026-12",
        "2026-11",
        "2026-10",
    ]
    assert 'href="/fees?month=2026-09"' not in page


@pytest.mark.parametrize("month", ["2026-13", HOSTILE, "", "9999-01"])
def test_wrong_month_is_named_and_kept_in_the_form(operator: httpx.Client, month: str) -> None:
    response = operator.get("/fees", params={"month": month})
    assert response.status_code == 400
    assert "Month must be a month such as 2026-11." in response.text
    assert "<script>alert" not in response.text
    assert operator.get("/fees.csv", params={"month": month}).status_code == 400


def test_csv_by_another_group_is_refused(operator: httpx.Client) -> None:
    response = operator.get("/fees.csv", params={"month": "2026-11", "by": HOSTILE})
    assert response.status_code == 400
    assert "by must be one of price, account, day" in response.text


def test_caps_are_shown_with_their_use(operator: httpx.Client, runtime: Runtime, ledger: LedgerBuilder) -> None:
    runtime.settings = runtime.settings.model_copy(
        update={"fee_cap_per_day": Decimal("0.50"), "fee_cap_per_month": Decimal(10)}
    )
    assert runtime.fee_caps == FeeCaps(per_day=Decimal("0.50"), per_month=Decimal(10))
    for number, day in enumerate((1, 3)):
        ledger.call(f"ref_cap_{number}", f"acct_cap_{number}", None, datetime(2026, 12, day, tzinfo=UTC), DIME)
    page = " ".join(operator.get("/fees").text.split())
    assert '<td class="number">0.10 USD</td><td class="number">0.50 USD</td><td class="number">20 %</td>' in page
    assert '<td class="number">0.20 USD</td><td class="number">10.00 USD</td><td class="number">2 %</td>' in page
    resets = re.findall(r'<time datetime="([^"]*)">[^<]*</time></td></tr>', page)
    assert resets == ["2026-12-04T00:00:00+00:00", "2027-01-01T00:00:00+00:00"]


def test_cap_of_calls_per_account_is_shown_with_the_account_that_uses_most_of_it(
    operator: httpx.Client, runtime: Runtime, ledger: LedgerBuilder
) -> None:
    """Void calls and calls of other days do not count."""
    runtime.settings = runtime.settings.model_copy(update={"call_cap_per_account_per_day": 4})
    assert runtime.fee_caps == FeeCaps(calls_per_account=4)
    today = datetime(2026, 12, 3, tzinfo=UTC)
    ends: dict[str, list[EntryState | None]] = {
        "busy": [EntryState.POSTED, None, None, EntryState.VOID],
        "calm": [None, None],
        "x": [EntryState.VOID] * 5,
    }
    for account, states in ends.items():
        for end in states:
            ledger.call(f"ref_{account}", f"acct_{account}", end, today, DIME)
    ledger.call("ref_calm", "acct_calm", None, today - timedelta(seconds=1), DIME)
    page = " ".join(operator.get("/fees").text.split())
    assert "calls per account and day (UTC)" in page
    assert '<a href="/payments?account=acct_busy">acct_busy</a> has the most calls' in page
    assert '<td class="number">3 calls</td><td class="number">4 calls</td><td class="number">75 %</td>' in page
    assert "2026-12-04 00:00:00Z" in page


def test_day_that_was_read_before_an_invoice_was_applied_is_not_kept(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its figures may be older than the calls that the invoice posted, and would be shown for ten minutes."""
    fee_days, read_day = FeeDays(runtime), statement_slices.read_day

    def read_while_an_invoice_is_applied(tx: Tx, day: datetime) -> DayStatement:
        read = read_day(tx, day)
        if day.day == 2:
            fee_days.forget()
        return read

    monkeypatch.setattr(statement_slices, "read_day", read_while_an_invoice_is_applied)
    month = parse_month("2026-11")
    assert month is not None
    with read_snapshot(runtime.engine) as tx:
        [fees] = fee_days.read_months(tx, [month])
    assert fees.missing_days == 2


def test_page_does_not_wait_for_slow_days(
    operator: httpx.Client, ledger: LedgerBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says how many days are missing, and reloads."""
    allowed, read_day = threading.Event(), statement_slices.read_day

    def read_when_allowed(tx: Tx, day: datetime) -> DayStatement:
        assert allowed.wait(60)
        return read_day(tx, day)

    monkeypatch.setattr(background_read, "PAGE_WAIT_S", 0.01)
    monkeypatch.setattr(statement_slices, "read_day", read_when_allowed)
    page = operator.get("/fees?month=2026-11").text
    assert "30 days are still being read" in page
    assert '<a href="">Load the page again</a>' in page
    allowed.set()
    monkeypatch.setattr(background_read, "PAGE_WAIT_S", 60)
    page = operator.get("/fees?month=2026-11").text
    assert "still being read" not in page


def test_pending_calls_are_those_of_the_command_line(
    operator: httpx.Client, ledger: LedgerBuilder, statement: Callable[..., str]
) -> None:
    ledger.call("ref_hostile", f"{HOSTILE}2", None, NOON, DIME)
    ledger.call("ref_young", "acct_young", None, datetime(2026, 12, 2, 12, tzinfo=UTC), DIME)
    page = operator.get("/fees/pending").text
    printed = statement("pending", "--json")
    assert printed.count('"call_id"') == page.count('<th scope="row">') == 2
    assert "acct_young" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\u202e" in page
    assert "<script>alert" not in page
