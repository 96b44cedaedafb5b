"""Refresh calls: the response, the log entry and the webhooks of each scenario."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import httpx
import pytest

from tests.support.simulator import Simulator, WebhookInbox, eventually

Accounts = Callable[[str], str]

TIMER_S = 0.002
"""Precision of the event loop's timers."""


def test_prompt_call_gets_202_without_a_body(simulator: Simulator, account: Accounts) -> None:
    """The headers contain the rate limit."""
    response = simulator.refresh(account("prompt"))
    assert (response.status_code, response.content) == (202, b"")
    assert response.headers["Ratelimit-Limit"] == "1000"
    assert int(response.headers["Ratelimit-Remaining"]) < 1000
    assert 0 <= int(response.headers["Ratelimit-Reset"]) - int(time.time()) <= 1


def test_event_of_a_call_has_a_valid_signature(
    simulator: Simulator, inbox: WebhookInbox, account: Accounts, secret: str
) -> None:
    """It contains one balance of the account, with source REFRESH and the present time."""
    account_id, before = account("prompt"), int(time.time())
    simulator.refresh(account_id)
    (request,) = inbox.wait_for_requests_about(account_id)
    (record,) = request.records()
    assert request.path == "/webhooks/quiltt"
    assert request.is_signed_with(secret)
    assert (record["accountId"], record["source"]) == (account_id, "REFRESH")
    assert (record["available"], record["current"], record["limit"]) == (500.00, 512.34, None)
    balance_at = datetime.strptime(record["at"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    assert before <= balance_at <= time.time()


def test_log_links_the_call_to_its_delivery(simulator: Simulator, account: Accounts) -> None:
    """The call and the delivery have the same balance id."""
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
def test_rejected_call_is_not_accepted(simulator: Simulator, account: Accounts, scenario: str, status: int) -> None:
    """Each call gets the status and its RestError. No event is sent."""
    account_id = account(scenario)
    for _ in range(2):
        response = simulator.refresh(account_id)
        assert response.status_code == status
        assert {"message", "instruction"} <= response.json().keys()
    assert all(not call["accepted"] and call["balance_id"] is None for call in simulator.calls(account_id))
    assert simulator.summary()["webhooks_pending"] == 0


def test_call_with_a_wrong_key_gets_401(simulator: Simulator, account: Accounts) -> None:
    """It is logged as neither authenticated nor accepted."""
    account_id = account("prompt")
    assert simulator.refresh(account_id, api_key="key_other").status_code == 401
    (call,) = simulator.calls(account_id)
    assert (call["authenticated"], call["accepted"], call["status"]) == (False, False, 401)


def test_malformed_account_id_gets_404(simulator: Simulator) -> None:
    """The account does not exist."""
    assert simulator.refresh("acct_no-such").status_code == 404


def test_every_other_call_of_a_throttled_account_gets_429(
    simulator: Simulator, inbox: WebhookInbox, account: Accounts
) -> None:
    """The 429 has the reset time. The call after it gets 202 and its event."""
    account_id = account("throttled")
    rejected, accepted, again = (simulator.refresh(account_id) for _ in range(3))
    assert [response.status_code for response in (rejected, accepted, again)] == [429, 202, 429]
    assert int(rejected.headers["Ratelimit-Reset"]) > time.time() - 1
    assert len(inbox.wait_for_requests_about(account_id)) == 1


def test_calls_above_the_rate_limit_get_429(simulator: Simulator, account: Accounts) -> None:
    """With a limit of one a second, at least one of three calls gets a 429. In the next second a call is accepted."""
    simulator.put("defaults", rate_limit_per_s=1)
    responses = [simulator.refresh(account("prompt")) for _ in range(3)]
    assert "0" in {response.headers["Ratelimit-Remaining"] for response in responses if response.status_code == 429}
    eventually(lambda: simulator.refresh(account("prompt")).status_code == 202)


@pytest.mark.parametrize(("scenario", "least_s"), [("slow", 0.2), ("late", 0.4)])
def test_event_is_sent_after_its_delay(simulator: Simulator, account: Accounts, scenario: str, least_s: float) -> None:
    """Slow and late events are delayed by their own settings."""
    account_id = account(scenario)
    simulator.refresh(account_id)
    simulator.wait_for_webhooks()
    (call,), (delivery,) = simulator.calls(account_id), simulator.deliveries(account_id)
    assert delivery["sent_at"] - call["started_at"] >= least_s - TIMER_S


def test_never_account_gets_no_balance(simulator: Simulator, account: Accounts) -> None:
    """The call is accepted. Nothing is delivered, and GraphQL still shows the old balance."""
    account_id = account("never")
    assert simulator.refresh(account_id).status_code == 202
    assert simulator.summary()["webhooks_pending"] == 0
    (call,) = simulator.calls(account_id)
    assert (call["accepted"], call["balance_id"]) == (True, None)
    assert simulator.graphql_account(account_id)["balance"]["source"] == "SYNC"


def test_unsent_balance_is_only_in_graphql(simulator: Simulator, account: Accounts) -> None:
    """Nothing is delivered."""
    account_id = account("unsent")
    simulator.refresh(account_id)
    simulator.wait_for_webhooks()
    balance = simulator.graphql_account(account_id)["balance"]
    assert (balance["source"], balance["id"]) == ("REFRESH", simulator.calls(account_id)[0]["balance_id"])
    assert simulator.deliveries(account_id) == []


def test_call_with_a_lost_response_is_accepted(simulator: Simulator, inbox: WebhookInbox, account: Accounts) -> None:
    """The connection closes without a response, and the event is delivered."""
    account_id = account("lost")
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        simulator.refresh(account_id)
    assert len(inbox.wait_for_requests_about(account_id)) == 1
    (call,) = simulator.calls(account_id)
    assert (call["accepted"], call["status"]) == (True, None)


def test_silent_call_stays_open_until_the_client_disconnects(simulator: Simulator, account: Accounts) -> None:
    """The call is accepted. It gets no response and no event."""
    account_id = account("silent")
    with pytest.raises(httpx.ReadTimeout):
        simulator.refresh(account_id, timeout_s=0.2)
    (call,) = simulator.calls(account_id)
    assert (call["accepted"], call["status"], call["balance_id"]) == (True, None, None)


def test_early_event_is_delivered_before_the_response(
    simulator: Simulator, inbox: WebhookInbox, account: Accounts
) -> None:
    """The webhook has been delivered when the 202 arrives."""
    account_id = account("early")
    assert simulator.refresh(account_id).status_code == 202
    assert len(inbox.requests_about(account_id)) == 1


def test_twice_event_is_in_two_deliveries(simulator: Simulator, inbox: WebhookInbox, account: Accounts) -> None:
    """The first delivery contains the event twice, the second one once."""
    account_id = account("twice")
    simulator.refresh(account_id)
    requests = inbox.wait_for_requests_about(account_id, count=2)
    ids = [[event["id"] for event in json.loads(request.body)["events"]] for request in requests]
    assert [len(found) for found in ids] == [2, 1]
    assert len({*ids[0], *ids[1]}) == 1


def test_forged_deliveries_have_a_wrong_signature(
    simulator: Simulator, inbox: WebhookInbox, account: Accounts, secret: str
) -> None:
    """They end after three attempts, and GraphQL shows no new balance."""
    inbox.response_statuses += [401, 401, 401]
    account_id = account("forged")
    simulator.refresh(account_id)
    simulator.wait_for_webhooks()
    assert not any(request.is_signed_with(secret) for request in inbox.requests_about(account_id))
    assert [entry["signature_valid"] for entry in simulator.deliveries(account_id)] == [False, False, False]
    assert simulator.graphql_account(account_id)["balance"]["source"] == "SYNC"


def test_stale_delivery_has_an_old_valid_signature(
    simulator: Simulator, inbox: WebhookInbox, account: Accounts, secret: str
) -> None:
    """The timestamp is ten minutes old."""
    account_id = account("stale")
    simulator.refresh(account_id)
    (request,) = inbox.wait_for_requests_about(account_id)
    simulator.wait_for_webhooks()
    (delivery,) = simulator.deliveries(account_id)
    assert request.is_signed_with(secret)
    assert delivery["signature_valid"]
    assert 600 <= delivery["sent_at"] - delivery["timestamp"] < 601


def test_batch_has_the_valid_event_among_others(simulator: Simulator, inbox: WebhookInbox, account: Accounts) -> None:
    """The others: foreign SYNC, unknown type, no account, text instead of a number, foreign REFRESH."""
    account_id = account("batch")
    simulator.refresh(account_id)
    (request,) = inbox.wait_for_requests_about(account_id)
    synced, unknown, without_account, malformed, valid, foreign = json.loads(request.body)["events"]
    assert (synced["record"]["source"], synced["record"]["accountId"] == account_id) == ("SYNC", False)
    assert unknown["type"] == "account.pondered"
    assert "accountId" not in without_account["record"]
    assert (malformed["record"]["accountId"], malformed["record"]["available"]) == (account_id, "abc")
    assert valid["record"]["id"] == simulator.calls(account_id)[0]["balance_id"]
    assert (foreign["record"]["source"], foreign["record"]["accountId"] == account_id) == ("REFRESH", False)


@pytest.mark.parametrize(("scenario", "available"), [("nullavail", None), ("poor", 1.00)])
def test_scenario_sets_the_amount(
    simulator: Simulator, inbox: WebhookInbox, account: Accounts, scenario: str, available: float | None
) -> None:
    """The event and GraphQL have the scenario's amount."""
    account_id = account(scenario)
    simulator.refresh(account_id)
    (request,) = inbox.wait_for_requests_about(account_id)
    assert request.records()[0]["available"] == available
    assert simulator.graphql_account(account_id)["balance"]["available"] == available


def test_mix_never_fails_permanently(simulator: Simulator, account: Accounts) -> None:
    """For each of 40 accounts one of two calls is accepted, and each accepted call gets its event."""
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
