"""Overrides of an account, balance queries, introspection and subscriptions."""

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from tests.support.simulator import Simulator, WebhookInbox, eventually

Accounts = Callable[[str], str]
TIMER_S = 0.002
"""Precision of the event loop's timers."""


@pytest.fixture
def ordinary(account: Accounts) -> str:
    return account("prompt")


def test_override_changes_scenario_delay_and_amounts(simulator: Simulator, inbox: WebhookInbox, ordinary: str) -> None:
    """The override has precedence over the account id."""
    values = {"scenario": "poor", "delay_s": 0.1, "available": "12.34", "current": None, "at_offset_s": -60}
    simulator.put(f"scenarios/{ordinary}", **values)
    simulator.refresh(ordinary)
    record = inbox.wait_for_requests_about(ordinary)[0].records()[0]
    (call,), (delivery,) = simulator.calls(ordinary), eventually(lambda: simulator.deliveries(ordinary))
    balance_at = datetime.strptime(record["at"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    assert (record["available"], record["current"]) == (12.34, None)
    assert 59 <= delivery["sent_at"] - balance_at <= 62
    assert delivery["sent_at"] - call["started_at"] >= 0.1 - TIMER_S
    assert call["scenario"] == "poor"


def test_empty_override_removes_an_override(simulator: Simulator, ordinary: str) -> None:
    """The account id selects the scenario again."""
    simulator.put(f"scenarios/{ordinary}", scenario="error")
    assert simulator.refresh(ordinary).status_code == 500
    simulator.put(f"scenarios/{ordinary}")
    assert simulator.refresh(ordinary).status_code == 202


def test_graphql_shows_the_newest_balance(simulator: Simulator, ordinary: str) -> None:
    """Before the first refresh this is the balance of a sync."""
    before = simulator.graphql_account(ordinary)
    assert before.keys() == {"id", "currencyCode", "kind", "state", "connection", "balance"}
    assert before["connection"].keys() == {"id", "status", "provider"}
    assert (before["balance"]["source"], before["currencyCode"]) == ("SYNC", "USD")
    simulator.refresh(ordinary)
    simulator.wait_for_webhooks()
    assert simulator.graphql_account(ordinary)["balance"]["id"] == simulator.calls(ordinary)[0]["balance_id"]


def test_graphql_shows_why_a_call_is_rejected(simulator: Simulator, account: Accounts) -> None:
    """The account does not exist, its kind is not supported, or its connection has an error.

    Calls of a credit line are accepted: only GraphQL shows its kind.
    """
    assert simulator.graphql_account(account("gone")) is None
    assert simulator.graphql_account(account("badreq"))["kind"] == "LOAN"
    assert simulator.graphql_account(account("credit"))["kind"] == "CREDIT"
    assert simulator.graphql_account(account("inactive"))["connection"]["status"] == "ERROR_REPAIRABLE"


def test_graphql_requires_the_key_and_a_variable(simulator: Simulator) -> None:
    """A wrong key or another scheme gets 401. A missing id gets an error with status 200."""
    assert simulator.graphql({"id": "acct_1"}, api_key="key_other").status_code == 401
    bearer = {"Authorization": f"Bearer {simulator.api_key}"}
    assert simulator.http.post("/v1/graphql", json={}, headers=bearer).status_code == 401
    missing: tuple[object, ...] = ({}, None, [])
    for variables in missing:
        response = simulator.graphql(variables)
        assert response.status_code == 200
        assert response.json()["errors"]


def test_introspection_returns_the_environment_of_the_key(simulator: Simulator) -> None:
    """A wrong key gets 401."""
    right, wrong = (
        simulator.http.post("/v1/introspect/api_key", headers={"Authorization": f"Bearer {key}"})
        for key in (simulator.api_key, "key_other")
    )
    assert right.json().keys() == {"id", "name", "apiVersion", "metadata", "environment"}
    assert right.json()["environment"]["mode"] == "TEST"
    assert wrong.status_code == 401


def test_subscription_can_be_created_changed_and_deleted(simulator: Simulator) -> None:
    """No response contains the secret."""
    http, path = simulator.http, "/v1/webhooks/subscriptions"
    bearer = {"Authorization": f"Bearer {simulator.api_key}"}
    fields = {"name": "payready", "targetUrl": "https://example.test/webhooks", "eventTypes": ["balance.created"]}
    created = http.post(path, json=fields, headers=bearer).json()
    assert created == {**fields, "id": created["id"], "disabled": False}
    assert http.get(path, headers=bearer).json() == [created]
    changed = http.patch(f"{path}/{created['id']}", json={"disabled": True}, headers=bearer).json()
    assert changed == {**created, "disabled": True}
    assert http.get(f"{path}/{created['id']}", headers=bearer).json() == changed
    assert http.delete(f"{path}/{created['id']}", headers=bearer).status_code == 204
    assert http.get(f"{path}/{created['id']}", headers=bearer).status_code == 404


def test_invalid_subscription_is_rejected(simulator: Simulator) -> None:
    """The key and all fields are required, and the target must be https."""
    path, bearer = "/v1/webhooks/subscriptions", {"Authorization": f"Bearer {simulator.api_key}"}
    assert simulator.http.get(path).status_code == 401
    assert simulator.http.delete(f"{path}/whs_1").status_code == 401
    for wrong in ({"name": "x"}, {"name": "x", "targetUrl": "http://x", "eventTypes": []}, {"eventTypes": "x"}):
        assert simulator.http.post(path, json=wrong, headers=bearer).status_code == 422
