import base64
import json
from collections.abc import Callable

import pytest

from simulator.signing import sign
from tests.support.simulator import Simulator, WebhookInbox, eventually

Accounts = Callable[[str], str]

TIMER_S = 0.002  # precision of the event loop's timers


@pytest.mark.parametrize("status", [301, 400, 401, 500, 503])
def test_status_other_than_2xx_is_retried(
    simulator: Simulator, inbox: WebhookInbox, account: Accounts, status: int
) -> None:
    """The same body is sent until it gets a 2xx, with increasing pauses."""
    inbox.response_statuses += [status, status]
    account_id = account("prompt")
    simulator.refresh(account_id)
    simulator.wait_for_webhooks()
    attempts = simulator.deliveries(account_id)
    assert [(entry["attempt"], entry["status"]) for entry in attempts] == [(1, status), (2, status), (3, 204)]
    assert len({request.body for request in inbox.requests_about(account_id)}) == 1
    first, second, third = (entry["sent_at"] for entry in attempts)
    assert second - first >= 0.05 - TIMER_S
    assert third - second >= 0.1 - TIMER_S


def test_event_is_dropped_after_twenty_attempts(simulator: Simulator, inbox: WebhookInbox, account: Accounts) -> None:
    """No webhook is pending afterwards."""
    simulator.put("defaults", retry_base_s=0)
    inbox.response_statuses += [500] * 25
    account_id = account("prompt")
    simulator.refresh(account_id)
    simulator.wait_for_webhooks()
    assert len(simulator.deliveries(account_id)) == 20


@pytest.mark.parametrize("keep", [False, True])
def test_retry_has_a_new_signature_unless_configured(
    simulator: Simulator, inbox: WebhookInbox, account: Accounts, secret: str, *, keep: bool
) -> None:
    """The retry has a new timestamp, or the first signature with `keep_signature`. Both are valid."""
    simulator.put("defaults", retry_base_s=1, keep_signature=keep)
    inbox.response_statuses.append(500)
    account_id = account("prompt")
    simulator.refresh(account_id)
    eventually(lambda: len(inbox.requests_about(account_id)) == 2)
    first, second = (
        (r.headers["quiltt-timestamp"], r.headers["quiltt-signature"]) for r in inbox.requests_about(account_id)
    )
    assert (first == second) is keep
    for timestamp, signature in (first, second):
        assert signature == sign(secret, timestamp, inbox.requests_about(account_id)[0].body)


def test_unreachable_webhook_is_retried(account: Accounts) -> None:
    """A refused connection is logged as an attempt with the error's name, and the event stays pending."""
    with WebhookInbox() as gone:
        url = gone.url
    account_id = account("prompt")
    with Simulator(url, secret="s", api_key="k") as simulator:
        simulator.put("defaults", prompt_s=0, retry_base_s=0.02)
        simulator.refresh(account_id)
        eventually(lambda: len(simulator.deliveries(account_id)) > 1)
        assert simulator.summary()["webhooks_pending"] == 1
        assert {entry["error"] for entry in simulator.deliveries(account_id)} == {"ConnectionRefusedError"}


def test_pause_stops_deliveries(simulator: Simulator, inbox: WebhookInbox, account: Accounts) -> None:
    """No webhook is sent while paused, but GraphQL shows the balances. All are sent after the resume."""
    simulator.post("pause")
    accounts = [account("prompt") for _ in range(40)]  # more than the number of connections
    for account_id in accounts:
        simulator.refresh(account_id)
    last = {"id": accounts[-1]}
    eventually(lambda: simulator.graphql(last).json()["data"]["account"]["balance"]["source"] == "REFRESH")
    assert (inbox.received, simulator.summary()["webhooks_pending"]) == ([], 40)
    simulator.post("resume")
    simulator.wait_for_webhooks()
    assert all(len(inbox.requests_about(account_id)) == 1 for account_id in accounts)


def test_any_body_can_be_delivered(simulator: Simulator, inbox: WebhookInbox, secret: str) -> None:
    """A given JSON body is sent once with a valid signature. The response contains the endpoint's status."""
    inbox.response_statuses.append(418)
    answer = simulator.post("deliver", body={"events": []})
    assert answer == {"status": 418, "deliveries": [{"status": 418, "error": None}]}
    (request,) = inbox.received
    assert json.loads(request.body) == {"events": []}
    assert request.headers["quiltt-signature"] == sign(secret, request.headers["quiltt-timestamp"], request.body)


def test_bytes_can_be_delivered_with_another_secret(simulator: Simulator, inbox: WebhookInbox) -> None:
    """Raw bytes, secret and timestamp are used as given. The log marks the signature as invalid."""
    raw = b"\xff not json"
    simulator.post("deliver", raw=base64.b64encode(raw).decode(), secret="other", timestamp=1700000000)
    (request,) = inbox.received
    assert request.body == raw
    assert request.headers["quiltt-timestamp"] == "1700000000"
    assert request.headers["quiltt-signature"] == sign("other", "1700000000", raw)
    (entry,) = simulator.http.get("/control/log").json()["deliveries"]
    assert (entry["signature_valid"], entry["timestamp"], entry["event_ids"]) == (False, 1700000000, [])


def test_copies_are_delivered_at_the_same_time(simulator: Simulator, inbox: WebhookInbox) -> None:
    """Each copy has its own response, even while other deliveries are paused."""
    simulator.post("pause")
    inbox.response_statuses += [200, 500, 200]
    answer = simulator.post("deliver", body={}, copies=3)
    assert sorted(entry["status"] for entry in answer["deliveries"]) == [200, 200, 500]


@pytest.mark.parametrize("wrong", [{}, {"body": {}, "raw": ""}, {"raw": "%"}, {"body": {}, "copies": 101}])
def test_invalid_delivery_is_rejected(simulator: Simulator, wrong: dict[str, object]) -> None:
    """A delivery has either a body or raw bytes in base64, and a limited number of copies."""
    assert simulator.http.post("/control/deliver", json=wrong).status_code == 422
