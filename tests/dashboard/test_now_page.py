"""The page Now: the picture of waiting payments, its figures, what needs attention, and its live updates."""

import itertools
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from html import unescape
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from sqlalchemy import insert, text

from dashboard import now_feed
from dashboard.application import build_app
from dashboard.now_feed import NowFeed, event_message
from dashboard.now_reading import NowReader
from dashboard.now_view import NowFigures
from dashboard.slow_figures import SlowFigureReader
from tests.dashboard.conftest import csrf_token_in, logged_in, serve
from tests.support.system import wait_until
from worker import flow
from worker.correlation.redis_client import create_client
from worker.ledger import fee_calls
from worker.ledger.engine import read_snapshot, transaction
from worker.ledger.tables import FEE_ENTRY, OUTCOME_DELIVERY, PAYMENT, REFRESH
from worker.ledger_metrics import LedgerCollector, used_ratios_of_set_day_and_month_caps
from worker.rules.fee_caps import CapKind
from worker.runtime import Runtime, build_dashboard_login_stores

pytestmark = pytest.mark.slow

HOSTILE_IDS = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "pay\u202egnp.exe",
    "../../etc/passwd",
    "{{7*7}}",
    "a\r\ndata: forged",
    "x" * 500,
)


@pytest.fixture(autouse=True)
def emptied_redis(valkey_url: str) -> None:
    """Other tests announce API keys in the same Redis."""
    with create_client(valkey_url) as redis:
        redis.flushdb()


def add_payments(runtime: Runtime, *rows: dict[str, Any]) -> None:
    """Insert payments that wait for a minute, with these changes."""
    now = datetime.now(UTC)
    defaults: dict[str, Any] = {
        "account_id": "acct_1",
        "state": "waiting",
        "job": {},
        "amount": None,
        "requested_at": now,
        "min_balance_at": now,
        "deadline": now + timedelta(minutes=1),
        "due_at": now,
        "resolved_at": None,
        "reason": None,
        "reused": False,
        "outcome": None,
    }
    with transaction(runtime.engine) as tx:
        tx.execute(insert(PAYMENT), [{**defaults, **row} for row in rows])


def resolved(payment_id: str, reason: str | None = None, *, minutes_ago: float = 1) -> dict[str, Any]:
    """Return the changes of a resolved payment."""
    at = datetime.now(UTC) - timedelta(minutes=minutes_ago)
    state = "failed" if reason else "released"
    return {"payment_id": payment_id, "state": state, "reason": reason, "resolved_at": at, "outcome": {}}


def add_calls(runtime: Runtime, states: dict[str, str | None], called_at: datetime) -> None:
    """Insert calls of 0.10 USD with these final states."""
    with transaction(runtime.engine) as tx:
        for call_id, state in states.items():
            refresh_id = f"ref_{call_id}"
            tx.execute(
                insert(REFRESH).values(
                    refresh_id=refresh_id, account_id="acct_1", state="answered", called_at=called_at
                )
            )
            for entry_state in filter(None, ("pending", state)):
                tx.execute(
                    insert(FEE_ENTRY).values(
                        call_id=call_id,
                        refresh_id=refresh_id,
                        account_id="acct_1",
                        state=entry_state,
                        price=Decimal("0.10"),
                        currency=runtime.price_list.currency,
                        price_list="x",
                        evidence={},
                        called_at=called_at,
                        recorded_at=called_at,
                    )
                )


def visible_text(html: str) -> str:
    """Return the text of a page in one line."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def marks(html: str) -> list[float]:
    """Return the horizontal positions of the marks."""
    return [float(percent) for percent in re.findall(r'<circle cx="([\d.]+)%"', html)]


def test_empty_ledger_needs_no_attention(operator: httpx.Client) -> None:
    page = visible_text(operator.get("/").text)
    assert "Nothing needs attention" in page
    assert "No payment waits" in page
    assert "No worker has announced its API key" in page


def test_marks_are_in_the_order_of_deadlines_and_move(runtime: Runtime, operator: httpx.Client) -> None:
    """The overdue payment is right of the deadline."""
    now = datetime.now(UTC)
    add_payments(
        runtime,
        {"payment_id": "late", "deadline": now - timedelta(seconds=5), "requested_at": now - timedelta(seconds=65)},
        {"payment_id": "soon", "deadline": now + timedelta(seconds=10), "amount": 5},
        {"payment_id": "calm", "deadline": now + timedelta(seconds=100)},
    )
    first = operator.get("/").text
    late, soon, calm = marks(first)
    assert late > 94 > soon > calm > 0
    assert "5.00 USD" in first
    wait_until(lambda: marks(operator.get("/").text) != [late, soon, calm], 15, "the figures are read again")
    assert all(after > before for before, after in zip((late, soon, calm), marks(operator.get("/").text), strict=True))


def test_what_needs_attention_names_the_party_and_links_the_place(runtime: Runtime, operator: httpx.Client) -> None:
    add_payments(
        runtime,
        {"payment_id": "late", "deadline": datetime.now(UTC) - timedelta(seconds=30)},
        resolved("refused", "not_authorized"),
        resolved("lost", minutes_ago=3),
    )
    with transaction(runtime.engine) as tx:
        due = {"continuation": {}, "due_at": datetime.now(UTC), "payment_id": "lost"}
        tx.execute(insert(OUTCOME_DELIVERY).values(task_id="t1", **due))
        tx.execute(insert(OUTCOME_DELIVERY).values(task_id="t2", undeliverable="x", **{**due, "due_at": None}))
    for _ in range(runtime.settings.circuit_breaker_failures):
        runtime.admission.apply_result_to_breaker_and_limiter("failed", None, datetime.now(UTC))
    flow.announce_api_key(runtime)
    html = operator.get("/").text
    page = visible_text(html)
    assert "5 things need attention" in page
    assert "we must act Payments wait past their deadline" in page
    assert "Quiltt must act Calls to Quiltt fail, so the circuit breaker is open" in page
    assert "1 outcome undeliverable" in page
    assert "1 outcome not delivered" in page
    assert "1 payment failed in the last hour with reason not_authorized: replace PAYREADY_QUILTT_API_KEY" in page
    assert 'href="/payments?reason=not_authorized&amp;resolved_since=' in html


def test_figures_are_those_of_the_metrics(runtime: Runtime) -> None:
    now = datetime.now(UTC)
    add_payments(runtime, {"payment_id": "w1"}, {"payment_id": "w2"}, *(resolved(f"r{n}") for n in range(3)))
    add_calls(runtime, {"posted": "posted", "void": "void", "open": None}, now)
    runtime.settings = runtime.settings.model_copy(update={"fee_cap_per_day": 1, "fee_cap_per_month": 2})
    collected = {sample.name: sample.values for sample in LedgerCollector(runtime)()}
    view = NowReader(runtime).view()
    assert view.figures.backlog.waiting_count == sum(collected["payready_waiting_payments"].values()) == 2
    assert view.figures.dead_letter_count == sum(collected["payready_stored_dead_letters"].values())
    slow = SlowFigureReader(runtime)
    slow.count()
    with read_snapshot(runtime.engine) as tx:
        ratios = used_ratios_of_set_day_and_month_caps(runtime, tx, now)
    assert {use.cap: use.ratio for use in slow.latest.cap_uses} == ratios
    assert set(ratios) == {CapKind.DAY, CapKind.MONTH}


def test_unresolved_calls_are_those_of_the_command_line(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted in steps, and a call that is posted later is not counted any more."""
    monkeypatch.setattr("worker.ledger.now_report.CALLS_PER_STEP", 1)
    now = datetime.now(UTC)
    for day in range(1, 4):
        calls = {f"posted{day}": "posted", f"open{day}": None, f"void{day}": "void"}
        add_calls(runtime, calls, now - timedelta(days=day, minutes=1))
    add_calls(runtime, {"fresh": None}, now)
    slow = SlowFigureReader(runtime)
    slow.count()
    with read_snapshot(runtime.engine) as tx:
        listed = {call.call_id for call in fee_calls.pending_calls(tx, now - timedelta(hours=24))}
    assert set(slow.latest.unresolved_at) == listed == {"open1", "open2", "open3"}
    with transaction(runtime.engine) as tx:
        tx.execute(
            text(
                "INSERT INTO fee_entry (call_id, refresh_id, account_id, state, price, currency, price_list, evidence,"
                " called_at, recorded_at) SELECT call_id, refresh_id, account_id, 'posted', price, currency,"
                " price_list, evidence, called_at, recorded_at FROM fee_entry WHERE call_id = 'open2'"
            )
        )
    slow.count()
    assert set(slow.latest.unresolved_at) == {"open1", "open3"}


def test_more_payments_than_marks_are_counted_by_bars(
    runtime: Runtime, operator: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashboard.now_reading.MAX_MARKS", 5)
    now = datetime.now(UTC)
    add_payments(
        runtime, *({"payment_id": f"p{n}", "deadline": now + timedelta(seconds=20 + 10 * n)} for n in range(12))
    )
    html = operator.get("/").text
    assert len(marks(html)) == 5
    counts = [int(count) for count in re.findall(r"<title>(\d+) payments?: ", html)]
    assert sum(counts) == 12
    assert "count all 12 by time left" in visible_text(html)


def test_outcomes_of_the_hour_are_counted_by_minute_and_reason(runtime: Runtime, operator: httpx.Client) -> None:
    """A finished minute is read once; a later payment of the current minute is counted."""
    add_payments(
        runtime,
        *(resolved(f"ok{n}", minutes_ago=10) for n in range(4)),
        resolved("bad", "insufficient_funds", minutes_ago=10),
        resolved("old", minutes_ago=70),
    )
    html = operator.get("/").text
    page = visible_text(html)
    assert "Resolved in the last hour: 5" in page
    assert "4 released, 1 failed" in page
    assert "failed insufficient_funds 1 20.0 % the payer must act" in page
    assert "/payments?reason=insufficient_funds&amp;resolved_since=20" in html


def listed(operator: httpx.Client, href: str) -> int:
    """Return how many payments the list of a link has."""
    return operator.get(unescape(href)).text.count('<td><a href="/payments/')


def test_figures_are_the_number_of_payments_that_their_links_list(runtime: Runtime, operator: httpx.Client) -> None:
    """The payments were requested at any time: the figures count resolutions and deliveries."""
    now = datetime.now(UTC)
    runtime.clock = lambda: now  # no minute ends during the test
    oldest_minute = now.replace(second=0, microsecond=0) - timedelta(minutes=59)
    before = {"requested_at": now - timedelta(hours=3)}
    bad = resolved("bad_1", "insufficient_funds") | before, resolved("bad_2", "insufficient_funds", minutes_ago=50)
    boundary = resolved("boundary", "insufficient_funds") | {"resolved_at": oldest_minute}
    too_old = resolved("old", "insufficient_funds") | before
    too_old["resolved_at"] = oldest_minute - timedelta(microseconds=1)
    refused = resolved("refused_old", "not_authorized", minutes_ago=70), resolved("refused", "not_authorized") | before
    add_payments(runtime, *bad, boundary, too_old, *refused, resolved("ok") | before, {"payment_id": "waiting"})
    due: dict[str, Any] = {"continuation": {}, "due_at": None, "undeliverable": None}
    with transaction(runtime.engine) as tx:
        for payment_id in ("bad_1", "bad_2"):
            row = due | {"task_id": payment_id, "payment_id": payment_id, "due_at": now - timedelta(hours=1)}
            tx.execute(insert(OUTCOME_DELIVERY).values(row))
        row = due | {"task_id": "t", "payment_id": "ok", "undeliverable": "unknown callback"}
        tx.execute(insert(OUTCOME_DELIVERY).values(row))
    html = operator.get("/").text
    groups = re.findall(r'class="number"><a href="(/payments[^"]*)">([0-9,]+)</a>', html)
    assert sorted(int(count) for _, count in groups) == [1, 1, 3]
    for href, count in groups:
        assert listed(operator, href) == int(count), href
    for name, count in {"undelivered outcomes": 2, "undeliverable": 1}.items():
        ((href, shown),) = re.findall(rf'<dt>{name}</dt><dd[^>]*><a href="([^"]*)">([0-9,]+)</a>', html)
        assert (int(shown), listed(operator, href)) == (count, count)
    for text_of_link, count in {
        "1 outcome undeliverable": 1,
        "2 outcomes not delivered": 2,
        "1 payment failed": 1,
    }.items():
        ((href,),) = [re.findall(rf'<a href="([^"]*)">{text_of_link}', html)]
        assert listed(operator, href) == count


def test_hostile_ids_are_escaped_on_the_page_and_in_the_stream(runtime: Runtime, operator: httpx.Client) -> None:
    add_payments(runtime, *({"payment_id": each} for each in HOSTILE_IDS))
    html = operator.get("/").text
    assert len(marks(html)) == len(HOSTILE_IDS)
    with operator.stream("GET", "/now/events") as stream:
        event = _next_event(stream.iter_lines())
    for content in (html, event):
        assert "<script>alert" not in content
        assert "<img" not in content
        assert "\u202e" not in content
        assert "49" not in re.findall(r"<title>([^<]*) ·", content)
    assert not any(line.startswith("data: forged") for line in event.split("\n"))


def _next_event(lines: Iterator[str]) -> str:
    found: list[str] = []
    for line in lines:
        if not line and found:
            break
        if not line.startswith(":"):
            found.append(line)
    return "\n".join(found)


def test_stream_sends_what_has_changed(runtime: Runtime, operator: httpx.Client) -> None:
    with operator.stream("GET", "/now/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.iter_lines()
        assert "No payment waits" in _next_event(lines)
        add_payments(runtime, {"payment_id": "new"})
        while "new" not in _next_event(lines):
            pass


def test_one_read_serves_all_streams_and_none_is_made_without_them(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[float] = []
    read = NowReader._read

    def note_and_read(reader: NowReader) -> NowFigures:
        reads.append(time.monotonic())
        return read(reader)

    monkeypatch.setattr(NowReader, "_read", note_and_read)
    app = build_app(runtime)
    with serve(app) as url, logged_in(url, "olivia") as client:
        with client.stream("GET", "/now/events") as first, client.stream("GET", "/now/events") as second:
            streams = [first.iter_lines(), second.iter_lines()]
            while len(reads) < 3:
                for lines in streams:
                    assert "event: now" in _next_event(lines)
            assert app.state.now_feed.stream_count == 2
        assert min(later - earlier for earlier, later in itertools.pairwise(reads)) > 0.9
        wait_until(lambda: not app.state.now_feed.stream_count, 10, "streams of gone browsers end")
        count = len(reads)
        time.sleep(1.5)  # that nothing happens has no event
        assert len(reads) <= count + 1, "the last read was in progress"


def test_streams_end_when_the_process_stops(runtime: Runtime) -> None:
    app = build_app(runtime)
    with serve(app) as url, logged_in(url, "olivia") as client, client.stream("GET", "/now/events") as stream:
        lines = stream.iter_lines()
        _next_event(lines)
        threading.Thread(target=app.state.now_feed.close).start()
        started = time.monotonic()
        for _ in lines:
            pass
        assert time.monotonic() - started < 4


def test_stream_ends_with_its_session(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(now_feed, "SESSION_CHECK_INTERVAL_S", 0.0)
    with serve(build_app(runtime)) as url, logged_in(url, "olivia") as client:
        token = csrf_token_in(client.get("/").text)
        with client.stream("GET", "/now/events") as stream:
            lines = stream.iter_lines()
            assert "event: now" in _next_event(lines)
            client.post("/logout", data={"csrf_token": token})
            while "event: ended" not in _next_event(lines):
                pass
            assert list(lines) == []


def test_stream_ends_cleanly_if_its_session_cannot_be_checked(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The browser connects again, and gets figures when Redis responds. An error would be logged for each stream."""
    monkeypatch.setattr(now_feed, "SESSION_CHECK_INTERVAL_S", 0.0)
    unavailable = runtime.settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    app = build_app(runtime)
    with serve(app) as url, logged_in(url, "olivia") as client:
        sessions = app.state.access._sessions
        with client.stream("GET", "/now/events") as stream:
            lines = stream.iter_lines()
            assert "event: now" in _next_event(lines)
            app.state.access._sessions = build_dashboard_login_stores(unavailable)[0]
            assert "event: ended" not in "\n".join(lines), "the page is not loaded again"
        app.state.access._sessions = sessions
        with client.stream("GET", "/now/events") as stream:
            assert "event: now" in _next_event(stream.iter_lines())


@pytest.mark.parametrize("line_end", ["\n", "\r", "\r\n"])
def test_each_line_end_of_the_standard_begins_a_line_of_data(line_end: str) -> None:
    text = f"one{line_end}event: forged{line_end}{line_end}two\u2028\x0bthree"
    assert event_message("now", text) == (
        b"event: now\ndata: one\ndata: event: forged\ndata: \ndata: two\xe2\x80\xa8\x0bthree\n\n"
    )


def test_too_many_streams_are_refused(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(now_feed, "MAX_STREAMS", 1)
    with (
        serve(build_app(runtime)) as url,
        logged_in(url, "olivia") as client,
        client.stream("GET", "/now/events") as stream,
    ):
        lines = stream.iter_lines()
        _next_event(lines)
        refused = client.get("/now/events")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "30")
        assert "too many live pages are open" in refused.text


def test_one_user_cannot_occupy_all_streams(runtime: Runtime) -> None:
    """Also with several sessions, and without reading. Other pages and other users are not affected."""
    app = build_app(runtime)
    with serve(app) as url, logged_in(url, "olivia") as client, logged_in(url, "victor") as other, ExitStack() as open_:
        address = urlsplit(url)
        session = client.cookies["payready_session"]
        request = f"GET /now/events HTTP/1.1\r\nHost: x\r\nCookie: payready_session={session}\r\n\r\n"
        answers = []
        for _ in range(500):
            connection = open_.enter_context(socket.create_connection((address.hostname, address.port), timeout=10))
            connection.sendall(request.encode())
            answers.append(connection.recv(12))
        assert answers.count(b"HTTP/1.1 200") == now_feed.MAX_STREAMS_OF_USER
        assert answers.count(b"HTTP/1.1 503") == 500 - now_feed.MAX_STREAMS_OF_USER
        with logged_in(url, "olivia") as again:
            assert "you have too many live pages open" in again.get("/now/events").text
            assert again.get("/audit").status_code == 200
        with other.stream("GET", "/now/events") as stream:
            assert "event: now" in _next_event(stream.iter_lines())
    assert app.state.now_feed.stream_count == 0


def test_browser_that_reads_nothing_is_disconnected(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each event is larger than the buffers of the connection."""
    monkeypatch.setattr(now_feed, "SEND_TIMEOUT_S", 0.2)
    monkeypatch.setattr(NowFeed, "_fragment", lambda _: "x" * 20_000_000)
    app = build_app(runtime)
    with serve(app) as url, logged_in(url, "olivia") as client, client.stream("GET", "/now/events"):
        wait_until(lambda: app.state.now_feed.version > 1, 10, "events were published")
        wait_until(lambda: not app.state.now_feed.stream_count, 10, "the stream ended")


def test_live_page_goes_on_after_an_error(
    runtime: Runtime, operator: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that there was one. The loop serves all browsers."""
    monkeypatch.setattr(now_feed, "RETRY_AFTER_FAILURE_S", 0.05)
    with operator.stream("GET", "/now/events", timeout=5) as stream:
        lines = stream.iter_lines()
        assert "event: now" in _next_event(lines)
        with monkeypatch.context() as failing:
            failing.setattr(NowFeed, "_fragment", lambda _: 1 / 0)
            while "an error in the dashboard" not in _next_event(lines):
                pass
        while "event: now" not in _next_event(lines):
            pass
