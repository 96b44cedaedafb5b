"""What the role reads before it listens need not be read for the first reader."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from dashboard import background_read
from dashboard.application import build_app
from dashboard.preparation import prepare_pages
from tests.dashboard.conftest import logged_in, serve
from tests.dashboard.test_now_page import visible_text
from worker.ledger import metrics_queries, provider_report
from worker.ledger.engine import open_engine
from worker.runtime import Runtime


def _record(calls: list[Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def record_and_call(tx: Any, since: datetime, until: datetime) -> Any:
        calls.append(until - since)
        return function(tx, since, until)

    return record_and_call


def test_first_reader_does_not_wait_for_an_hour_of_outcomes_or_a_week_of_calls(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes: list[timedelta] = []
    spans: list[timedelta] = []
    count, sample = metrics_queries.resolved_counts_by_state_and_reason, provider_report.sample_calls
    monkeypatch.setattr(metrics_queries, "resolved_counts_by_state_and_reason", _record(minutes, count))
    monkeypatch.setattr(provider_report, "sample_calls", _record(spans, sample))
    app = build_app(runtime)
    prepare_pages(app)
    assert (len(minutes), len(spans)) == (60, 3)
    with serve(app) as url, logged_in(url, "olivia") as client:
        assert client.get("/").status_code == httpx.codes.OK
        assert len(minutes) < 60 + 5
        page = visible_text(client.get("/provider?span=week").text)
    assert "still being read" not in page
    assert len(spans) == 3


def test_role_starts_without_the_database(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages say what is missing, until the database is there."""
    monkeypatch.setattr(background_read, "PAGE_WAIT_S", 60)
    reachable = runtime.engine
    app = build_app(runtime)
    runtime.engine = open_engine("postgresql://payready@127.0.0.1:1/none", connections=1)
    prepare_pages(app)
    with serve(app) as url, logged_in(url, "olivia") as client:
        for path in ("/", "/provider", "/fees"):
            assert client.get(path).status_code == httpx.codes.SERVICE_UNAVAILABLE, path
        runtime.engine = reachable
        assert client.get("/provider").status_code == httpx.codes.OK
