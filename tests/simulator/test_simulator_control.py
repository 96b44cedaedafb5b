"""Control endpoints: log, summary, defaults, refused connections, and validation of requests."""

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.support.simulator import Simulator, WebhookInbox, eventually

Accounts = Callable[[str], str]


def test_health_check_returns_ok(simulator: Simulator) -> None:
    assert simulator.http.get("/healthz").json() == {"status": "ok"}


def test_log_returns_the_entries_after_given_sequence_numbers(simulator: Simulator, account: Accounts) -> None:
    """The entries have the order of the log."""
    for _ in range(3):
        simulator.refresh(account("prompt"))
    simulator.wait_for_webhooks()
    log = simulator.http.get("/control/log").json()
    assert (len(log["calls"]), len(log["deliveries"])) == (3, 3)
    query = {"since_call": log["calls"][0]["seq"], "since_delivery": log["deliveries"][1]["seq"]}
    rest = simulator.http.get("/control/log", params=query).json()
    assert rest == {"calls": log["calls"][1:], "deliveries": log["deliveries"][2:]}


def test_log_can_be_deleted(simulator: Simulator, account: Accounts) -> None:
    """It is empty then, and the sequence numbers continue."""
    simulator.refresh(account("never"))
    (before,) = simulator.http.get("/control/log").json()["calls"]
    assert simulator.http.delete("/control/log").status_code == 204
    assert simulator.http.get("/control/log").json() == {"calls": [], "deliveries": []}
    simulator.refresh(account("never"))
    (after,) = simulator.http.get("/control/log").json()["calls"]
    assert after["seq"] == before["seq"] + 1


def test_summary_counts_calls_and_deliveries(simulator: Simulator, inbox: WebhookInbox, account: Accounts) -> None:
    """It counts calls by scenario and status, accepted calls, and deliveries by status."""
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


def test_defaults_can_be_read_and_changed(simulator: Simulator) -> None:
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
def test_invalid_value_is_rejected_with_its_name(simulator: Simulator, path: str, wrong: Any, named: str) -> None:
    """Unknown keys and invalid values are errors, so that a misspelt setting has no silent effect."""
    response = simulator.http.put(f"/control/{path}", json=wrong)
    assert response.status_code == 422
    assert named in response.json()["error"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("delay_s", "NaN"),
        ("delay_s", "Infinity"),
        ("at_offset_s", "-Infinity"),
        ("at_offset_s", "1" + "0" * 400),
        ("available", "NaN"),
        ("available", '"NaN"'),
        ("current", '"Infinity"'),
        ("limit", '"1e400"'),
    ],
)
def test_number_that_is_not_finite_is_rejected(simulator: Simulator, field: str, value: str) -> None:
    """Python's JSON parser accepts NaN and Infinity, but JSON has no such numbers, and no delay is infinite."""
    response = simulator.http.put("/control/scenarios/acct_1", content=f'{{"{field}": {value}}}')
    assert response.status_code == 422
    assert field in response.json()["error"]


def test_malformed_control_request_is_rejected(simulator: Simulator) -> None:
    """The body is not JSON, a field is missing, or a sequence number is not a number."""
    assert simulator.http.put("/control/defaults", content=b"{").status_code == 422
    assert simulator.http.post("/control/refuse", json={}).status_code == 422
    assert simulator.http.get("/control/log", params={"since_call": "x"}).status_code == 422


def test_connections_are_refused_for_the_given_seconds(simulator: Simulator, account: Accounts) -> None:
    """This includes open connections. Then the simulator listens on the same port again and has its log."""
    account_id, started = account("never"), time.monotonic()
    simulator.refresh(account_id)
    simulator.post("refuse", seconds=0.3)
    with pytest.raises(httpx.ConnectError):
        simulator.refresh(account_id)

    def is_back() -> bool:
        try:
            return simulator.refresh(account_id).status_code == 202
        except httpx.ConnectError:
            return False

    eventually(is_back)
    assert time.monotonic() - started >= 0.29
    assert len(simulator.calls(account_id)) == 2
