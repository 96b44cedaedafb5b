from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from simulator.testing import Simulator, WebhookInbox, eventually

Accounts = Callable[[str], str]


def test_it_is_healthy(simulator: Simulator) -> None:
    """The process says that it is there."""
    assert simulator.http.get("/healthz").json() == {"status": "ok"}


def test_the_log_can_be_read_on_from_where_one_was(simulator: Simulator, account: Accounts) -> None:
    """Entries after the given sequence numbers, in order, and none twice."""
    for _ in range(3):
        simulator.refresh(account("prompt"))
    simulator.wait_for_webhooks()
    log = simulator.http.get("/control/log").json()
    assert (len(log["calls"]), len(log["deliveries"])) == (3, 3)
    query = {"since_call": log["calls"][0]["seq"], "since_delivery": log["deliveries"][1]["seq"]}
    rest = simulator.http.get("/control/log", params=query).json()
    assert rest == {"calls": log["calls"][1:], "deliveries": log["deliveries"][2:]}


def test_the_log_can_be_forgotten(simulator: Simulator, account: Accounts) -> None:
    """After a reset it is empty, and the sequence numbers go on."""
    simulator.refresh(account("never"))
    (before,) = simulator.http.get("/control/log").json()["calls"]
    assert simulator.http.delete("/control/log").status_code == 204
    assert simulator.http.get("/control/log").json() == {"calls": [], "deliveries": []}
    simulator.refresh(account("never"))
    (after,) = simulator.http.get("/control/log").json()["calls"]
    assert after["seq"] == before["seq"] + 1


def test_the_summary_counts(simulator: Simulator, inbox: WebhookInbox, account: Accounts) -> None:
    """Calls by scenario and status, what is billed, deliveries by status."""
    inbox.response_statuses.append(500)
    for scenario in ("prompt", "prompt", "never", "error"):
        simulator.refresh(account(scenario))
    with pytest.raises(httpx.TransportError):
        simulator.refresh(account("lost"))
    simulator.wait_for_webhooks()
    assert simulator.summary() == {
        "calls": 5,
        "accepted": 4,
        "calls_by_scenario": {"prompt": 2, "never": 1, "error": 1, "lost": 1},
        "calls_by_status": {"202": 3, "500": 1, "none": 1},
        "deliveries": 4,
        "deliveries_by_status": {"500": 1, "204": 3},
        "webhooks_pending": 0,
    }


def test_the_settings_can_be_read_and_changed(simulator: Simulator) -> None:
    """The response has all settings. Settings that are not given stay unchanged."""
    before = simulator.put("defaults")
    assert simulator.put("defaults", late_s=9) == {**before, "late_s": 9}


@pytest.mark.parametrize(
    ("path", "wrong", "named"),
    [
        ("scenarios/acct_1", {"scenario": "nice"}, "scenario"),
        ("scenarios/acct_1", {"available": "abc"}, "available"),
        ("scenarios/acct_1", {"delay_s": -1}, "delay_s"),
        ("scenarios/acct_1", {"delay_s": True}, "delay_s"),
        ("scenarios/acct_1", {"availble": "1"}, "availble"),
        ("defaults", {"prompt": 1}, "prompt"),
        ("defaults", {"keep_signature": 1}, "keep_signature"),
        ("defaults", {"rate_limit_per_s": 0}, "rate_limit_per_s"),
        ("defaults", [], "object"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(simulator: Simulator, path: str, wrong: Any, named: str) -> None:
    """Unknown keys and wrong values are errors: a misspelt setting must not pass in silence."""
    response = simulator.http.put(f"/control/{path}", json=wrong)
    assert response.status_code == 422
    assert named in response.json()["error"]


def test_other_nonsense_is_refused(simulator: Simulator) -> None:
    """No JSON, no number of seconds, no sequence number."""
    assert simulator.http.put("/control/defaults", content=b"{").status_code == 422
    assert simulator.http.post("/control/refuse", json={}).status_code == 422
    assert simulator.http.get("/control/log", params={"since_call": "x"}).status_code == 422


def test_connections_are_refused_for_a_while(simulator: Simulator, account: Accounts) -> None:
    """New and kept connections alike; then it listens on the same port again, with its log."""
    account_id, started = account("never"), time.monotonic()
    simulator.refresh(account_id)
    simulator.post("refuse", seconds=0.3)
    with pytest.raises(httpx.ConnectError):
        simulator.refresh(account_id)

    def back() -> bool:
        try:
            return simulator.refresh(account_id).status_code == 202
        except httpx.ConnectError:
            return False

    eventually(back)
    assert time.monotonic() - started >= 0.29
    assert len(simulator.calls(account_id)) == 2
