from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from simulator.signing import sign
from simulator.testing import ReceivedRequest, Simulator, WebhookInbox, eventually

Accounts = Callable[[str], str]

TIMER_S = 0.002  # the loop's timers are that exact


def records(request: ReceivedRequest) -> list[dict[str, Any]]:
    return [event["record"] for event in json.loads(request.body)["events"]]


def signed_with(secret: str, request: ReceivedRequest) -> bool:
    expected = sign(secret, request.headers["quiltt-timestamp"], request.body)
    return request.headers["quiltt-signature"] == expected


def arrived(inbox: WebhookInbox, account_id: str, count: int = 1) -> list[ReceivedRequest]:
    eventually(lambda: len(inbox.requests_about(account_id)) >= count)
    return inbox.requests_about(account_id)


def read(simulator: Simulator, account_id: str) -> Any:
    return simulator.graphql({"id": account_id}).json()["data"]["account"]


def test_a_prompt_call_is_answered_202_without_a_body(simulator: Simulator, account: Accounts) -> None:
    """The response names no balance; the rate limit is in the headers."""
    response = simulator.refresh(account("prompt"))
    assert (response.status_code, response.content) == (202, b"")
    assert response.headers["Ratelimit-Limit"] == "1000"
    assert int(response.headers["Ratelimit-Remaining"]) < 1000
    assert 0 <= int(response.headers["Ratelimit-Reset"]) - int(time.time()) <= 1


def test_its_event_arrives_signed(simulator: Simulator, inbox: WebhookInbox, account: Accounts, secret: str) -> None:
    """One balance of this account with source REFRESH comes, made now, under a signature over the raw bytes."""
    account_id, before = account("prompt"), int(time.time())
    simulator.refresh(account_id)
    (request,) = arrived(inbox, account_id)
    (record,) = records(request)
    assert request.path == "/webhooks/quiltt"
    assert signed_with(secret, request)
    assert (record["accountId"], record["source"]) == (account_id, "REFRESH")
    assert (record["available"], record["current"], record["limit"]) == (500.00, 512.34, None)
    made = datetime.strptime(record["at"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    assert before <= made <= time.time()


def test_the_log_ties_the_call_to_its_event(simulator: Simulator, account: Accounts) -> None:
    """The accepted call names the balance that the delivery carries."""
    account_id = account("prompt")
    simulator.refresh(account_id)
    simulator.wait_for_webhooks()
    (call,), (delivery,) = simulator.calls(account_id), simulator.deliveries(account_id)
    assert (call["authenticated"], call["accepted"], call["status"]) == (True, True, 202)
    assert (call["scenario"], call["effective_scenario"]) == ("prompt", "prompt")
    assert delivery["balance_ids"] == [call["balance_id"]]
    assert delivery["account_ids"] == [account_id]
    assert (delivery["attempt"], delivery["status"], delivery["error"]) == (1, 204, None)
    assert delivery["signature_valid"]
    assert call["started_at"] <= delivery["sent_at"] <= time.time()


@pytest.mark.parametrize(
    ("scenario", "status"), [("badreq", 400), ("unauth", 401), ("inactive", 403), ("gone", 404), ("error", 500)]
)
def test_a_refused_call_is_not_billed(simulator: Simulator, account: Accounts, scenario: str, status: int) -> None:
    """The status and its RestError come back, each time; the call is not accepted and no event follows."""
    account_id = account(scenario)
    for _ in range(2):
        response = simulator.refresh(account_id)
        assert response.status_code == status
        assert {"message", "instruction"} <= response.json().keys()
    assert all(not call["accepted"] and call["balance_id"] is None for call in simulator.calls(account_id))
    assert simulator.summary()["webhooks_pending"] == 0


def test_a_wrong_key_is_refused_whatever_the_account(simulator: Simulator, account: Accounts) -> None:
    """401, logged as not authenticated and not accepted."""
    account_id = account("prompt")
    assert simulator.refresh(account_id, api_key="key_other").status_code == 401
    (call,) = simulator.calls(account_id)
    assert (call["authenticated"], call["accepted"], call["status"]) == (False, False, 401)


def test_a_malformed_account_id_is_not_found(simulator: Simulator) -> None:
    """404, as for an account that does not exist."""
    assert simulator.refresh("acct_no-such").status_code == 404


def test_a_throttled_account_is_refused_every_other_time(
    simulator: Simulator, inbox: WebhookInbox, account: Accounts
) -> None:
    """429 with the reset time, then 202 and the event; never refused two times in a row."""
    account_id = account("throttled")
    refused, accepted, again = (simulator.refresh(account_id) for _ in range(3))
    assert [response.status_code for response in (refused, accepted, again)] == [429, 202, 429]
    assert int(refused.headers["Ratelimit-Reset"]) > time.time() - 1
    assert len(arrived(inbox, account_id)) == 1


def test_calls_above_the_rate_limit_are_refused(simulator: Simulator, account: Accounts) -> None:
    """With a limit of one a second, three calls at once cannot all pass; in the next second one can."""
    simulator.put("defaults", rate_limit_per_s=1)
    responses = [simulator.refresh(account("prompt")) for _ in range(3)]
    assert "0" in {response.headers["Ratelimit-Remaining"] for response in responses if response.status_code == 429}
    eventually(lambda: simulator.refresh(account("prompt")).status_code == 202)


@pytest.mark.parametrize(("scenario", "least_s"), [("slow", 0.2), ("late", 0.4)])
def test_an_event_takes_its_time(simulator: Simulator, account: Accounts, scenario: str, least_s: float) -> None:
    """Slow and late events are sent after their delay and not before."""
    account_id = account(scenario)
    simulator.refresh(account_id)
    simulator.wait_for_webhooks()
    (call,), (delivery,) = simulator.calls(account_id), simulator.deliveries(account_id)
    assert delivery["sent_at"] - call["started_at"] >= least_s - TIMER_S


def test_a_never_account_is_billed_for_nothing(simulator: Simulator, account: Accounts) -> None:
    """202, no delivery, and GraphQL still shows the old balance."""
    account_id = account("never")
    assert simulator.refresh(account_id).status_code == 202
    assert simulator.summary()["webhooks_pending"] == 0
    (call,) = simulator.calls(account_id)
    assert (call["accepted"], call["balance_id"]) == (True, None)
    assert read(simulator, account_id)["balance"]["source"] == "SYNC"


def test_an_unsent_event_can_only_be_read(simulator: Simulator, account: Accounts) -> None:
    """The new balance shows up in GraphQL, and nothing is delivered."""
    account_id = account("unsent")
    simulator.refresh(account_id)
    simulator.wait_for_webhooks()
    balance = read(simulator, account_id)["balance"]
    assert (balance["source"], balance["id"]) == ("REFRESH", simulator.calls(account_id)[0]["balance_id"])
    assert simulator.deliveries(account_id) == []


def test_a_lost_answer_is_accepted_all_the_same(simulator: Simulator, inbox: WebhookInbox, account: Accounts) -> None:
    """The connection closes without an answer, the call is billed, the event comes."""
    account_id = account("lost")
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        simulator.refresh(account_id)
    assert len(arrived(inbox, account_id)) == 1
    (call,) = simulator.calls(account_id)
    assert (call["accepted"], call["status"]) == (True, None)


def test_a_silent_call_stays_open_until_the_client_gives_up(simulator: Simulator, account: Accounts) -> None:
    """No answer, no event, but billed."""
    account_id = account("silent")
    with pytest.raises(httpx.ReadTimeout):
        simulator.refresh(account_id, timeout_s=0.2)
    (call,) = simulator.calls(account_id)
    assert (call["accepted"], call["status"], call["balance_id"]) == (True, None, None)


def test_an_early_event_comes_before_the_answer(simulator: Simulator, inbox: WebhookInbox, account: Accounts) -> None:
    """When the 202 is there, the webhook has already been delivered."""
    account_id = account("early")
    assert simulator.refresh(account_id).status_code == 202
    assert len(inbox.requests_about(account_id)) == 1


def test_a_twice_event_comes_in_two_deliveries(simulator: Simulator, inbox: WebhookInbox, account: Accounts) -> None:
    """The same event two times in the first delivery and once in a second one."""
    account_id = account("twice")
    simulator.refresh(account_id)
    requests = arrived(inbox, account_id, count=2)
    ids = [[event["id"] for event in json.loads(request.body)["events"]] for request in requests]
    assert [len(found) for found in ids] == [2, 1]
    assert len({*ids[0], *ids[1]}) == 1


def test_forged_deliveries_never_verify(
    simulator: Simulator, inbox: WebhookInbox, account: Accounts, secret: str
) -> None:
    """All of a few tries carry a wrong signature, and there is no balance behind them."""
    inbox.response_statuses += [401, 401, 401]
    account_id = account("forged")
    simulator.refresh(account_id)
    simulator.wait_for_webhooks()
    assert not any(signed_with(secret, request) for request in inbox.requests_about(account_id))
    assert [entry["signature_valid"] for entry in simulator.deliveries(account_id)] == [False, False, False]
    assert read(simulator, account_id)["balance"]["source"] == "SYNC"


def test_stale_deliveries_verify_but_are_old(
    simulator: Simulator, inbox: WebhookInbox, account: Accounts, secret: str
) -> None:
    """The signature is right for a timestamp ten minutes ago; the balance inside is as of now."""
    account_id = account("stale")
    simulator.refresh(account_id)
    (request,) = arrived(inbox, account_id)
    simulator.wait_for_webhooks()
    (delivery,) = simulator.deliveries(account_id)
    assert signed_with(secret, request)
    assert delivery["signature_valid"]
    assert 600 <= delivery["sent_at"] - delivery["timestamp"] < 601


def test_batch_has_the_right_event_among_others(simulator: Simulator, inbox: WebhookInbox, account: Accounts) -> None:
    """A foreign SYNC, an unknown type, no account, a word for a number, ours, a foreign REFRESH."""
    account_id = account("batch")
    simulator.refresh(account_id)
    (request,) = arrived(inbox, account_id)
    synced, unknown, homeless, garbled, right, foreign = json.loads(request.body)["events"]
    assert (synced["record"]["source"], synced["record"]["accountId"] == account_id) == ("SYNC", False)
    assert unknown["type"] == "account.pondered"
    assert "accountId" not in homeless["record"]
    assert (garbled["record"]["accountId"], garbled["record"]["available"]) == (account_id, "abc")
    assert right["record"]["id"] == simulator.calls(account_id)[0]["balance_id"]
    assert (foreign["record"]["source"], foreign["record"]["accountId"] == account_id) == ("REFRESH", False)


@pytest.mark.parametrize(("scenario", "available"), [("nullavail", None), ("poor", 1.00)])
def test_the_scenario_sets_the_amount(
    simulator: Simulator, inbox: WebhookInbox, account: Accounts, scenario: str, available: float | None
) -> None:
    """The event and GraphQL carry the scenario's amount."""
    account_id = account(scenario)
    simulator.refresh(account_id)
    (request,) = arrived(inbox, account_id)
    assert records(request)[0]["available"] == available
    assert read(simulator, account_id)["balance"]["available"] == available


def test_the_mix_never_fails_for_good(simulator: Simulator, account: Accounts) -> None:
    """Each of forty accounts gets a call accepted within two tries, and each accepted call gets its event."""
    accounts = [account("mix") for _ in range(40)]
    for account_id in accounts:
        simulator.put(f"scenarios/{account_id}", delay_s=0)

    def call(account_id: str) -> None:
        try:
            if simulator.refresh(account_id).status_code == 429:
                simulator.refresh(account_id)
        except httpx.TransportError:
            pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(call, accounts))
    simulator.wait_for_webhooks()
    for account_id in accounts:
        (balance_id,) = [entry["balance_id"] for entry in simulator.calls(account_id) if entry["accepted"]]
        assert [balance_id] in [entry["balance_ids"] for entry in simulator.deliveries(account_id)]
    assert len({entry["effective_scenario"] for account_id in accounts for entry in simulator.calls(account_id)}) > 1


@pytest.fixture
def ordinary(account: Accounts) -> str:
    return account("prompt")


def test_an_account_can_be_given_another_scenario(simulator: Simulator, inbox: WebhookInbox, ordinary: str) -> None:
    """Scenario, delay, amounts and age are taken from the override instead of from the id."""
    values = {"scenario": "poor", "delay_s": 0.1, "available": "12.34", "current": None, "at_offset_s": -60}
    simulator.put(f"scenarios/{ordinary}", **values)
    simulator.refresh(ordinary)
    record = records(arrived(inbox, ordinary)[0])[0]
    (call,), (delivery,) = simulator.calls(ordinary), eventually(lambda: simulator.deliveries(ordinary))
    made = datetime.strptime(record["at"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    assert (record["available"], record["current"]) == (12.34, None)
    assert 59 <= delivery["sent_at"] - made <= 62
    assert delivery["sent_at"] - call["started_at"] >= 0.1 - TIMER_S
    assert call["scenario"] == "poor"


def test_an_empty_override_makes_it_ordinary_again(simulator: Simulator, ordinary: str) -> None:
    """What was special about an account is forgotten."""
    simulator.put(f"scenarios/{ordinary}", scenario="error")
    assert simulator.refresh(ordinary).status_code == 500
    simulator.put(f"scenarios/{ordinary}")
    assert simulator.refresh(ordinary).status_code == 202


def test_graphql_shows_the_account_with_its_newest_balance(simulator: Simulator, ordinary: str) -> None:
    """First the balance of a past sync; after a refresh the new one, by the id the call will cause."""
    before = read(simulator, ordinary)
    assert before.keys() == {"id", "currencyCode", "kind", "state", "connection", "balance"}
    assert before["connection"].keys() == {"id", "status", "provider"}
    assert (before["balance"]["source"], before["currencyCode"]) == ("SYNC", "USD")
    simulator.refresh(ordinary)
    simulator.wait_for_webhooks()
    assert read(simulator, ordinary)["balance"]["id"] == simulator.calls(ordinary)[0]["balance_id"]


def test_graphql_shows_why_a_refresh_is_refused(simulator: Simulator, account: Accounts) -> None:
    """No account that is gone, a kind that is not supported, a connection in error."""
    assert read(simulator, account("gone")) is None
    assert read(simulator, account("badreq"))["kind"] == "LOAN"
    assert read(simulator, account("inactive"))["connection"]["status"] == "ERROR_REPAIRABLE"


def test_graphql_needs_the_key_and_a_variable(simulator: Simulator) -> None:
    """401 for a wrong key or another scheme; errors with status 200 when the id is missing."""
    assert simulator.graphql({"id": "acct_1"}, api_key="key_other").status_code == 401
    bearer = {"Authorization": f"Bearer {simulator.api_key}"}
    assert simulator.http.post("/v1/graphql", json={}, headers=bearer).status_code == 401
    missing: tuple[object, ...] = ({}, None, [])
    for variables in missing:
        response = simulator.graphql(variables)
        assert response.status_code == 200
        assert response.json()["errors"]


def test_a_key_can_be_introspected(simulator: Simulator) -> None:
    """The right key returns its environment and mode, a wrong one gets 401."""
    right, wrong = (
        simulator.http.post("/v1/introspect/api_key", headers={"Authorization": f"Bearer {key}"})
        for key in (simulator.api_key, "key_other")
    )
    assert right.json().keys() == {"id", "name", "apiVersion", "metadata", "environment"}
    assert right.json()["environment"]["mode"] == "TEST"
    assert wrong.status_code == 401


def test_subscriptions_are_kept(simulator: Simulator) -> None:
    """A subscription can be created, listed, read, changed and deleted; no response contains the secret."""
    http, path = simulator.http, "/v1/webhooks/subscriptions"
    bearer = {"Authorization": f"Bearer {simulator.api_key}"}
    wanted = {"name": "payready", "targetUrl": "https://example.test/webhooks", "eventTypes": ["balance.created"]}
    kept = http.post(path, json=wanted, headers=bearer).json()
    assert kept == {**wanted, "id": kept["id"], "disabled": False}
    assert http.get(path, headers=bearer).json() == [kept]
    changed = http.patch(f"{path}/{kept['id']}", json={"disabled": True}, headers=bearer).json()
    assert changed == {**kept, "disabled": True}
    assert http.get(f"{path}/{kept['id']}", headers=bearer).json() == changed
    assert http.delete(f"{path}/{kept['id']}", headers=bearer).status_code == 204
    assert http.get(f"{path}/{kept['id']}", headers=bearer).status_code == 404


def test_subscriptions_are_checked(simulator: Simulator) -> None:
    """A key is needed, the target must be https, and nothing may be missing."""
    path, bearer = "/v1/webhooks/subscriptions", {"Authorization": f"Bearer {simulator.api_key}"}
    assert simulator.http.get(path).status_code == 401
    assert simulator.http.delete(f"{path}/whs_1").status_code == 401
    for wrong in ({"name": "x"}, {"name": "x", "targetUrl": "http://x", "eventTypes": []}, {"eventTypes": "x"}):
        assert simulator.http.post(path, json=wrong, headers=bearer).status_code == 422
