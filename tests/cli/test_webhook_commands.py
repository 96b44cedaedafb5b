"""Commands about quarantined events and the webhook subscription."""

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import SecretStr
from redis import Redis
from typer.testing import CliRunner

from cli.main import app
from config.settings import settings
from tests.cli.conftest import NOON, LedgerBuilder
from tests.support.raw_server import raw_server, respond
from tests.support.simulator import Simulator
from worker import metrics, runtime
from worker.errors import CallFailed
from worker.ledger import quarantine
from worker.ledger.engine import transaction
from worker.ledger.tables import BALANCE
from worker.quiltt.messages import REQUIRED_EVENT_TYPES, UnparsedEvent
from worker.quiltt.subscriptions import (
    Subscription,
    SubscriptionsClient,
    find_problems_of_best_subscription,
    log_subscription_problems_and_set_metric,
)

Run = Callable[..., Any]
URL = "https://payready.example/webhooks/quiltt"
RECORD = {"id": "bal_1", "accountId": "acct_1", "at": "2026-11-22T12:00:00Z", "source": "REFRESH"}
AMOUNTS = {"available": 1, "current": None, "limit": None}


def event(**record: Any) -> bytes:
    """Create a balance event."""
    return json.dumps({"id": "evt_1", "type": "balance.created", "record": {**RECORD, **record}}).encode()


PARSEABLE_NOW, ROUTINE_NOW = event(**AMOUNTS), event(source="SOME_NEW_WORD")
ODD = b'{"type": "balance.created", "text": "\x1b[2J\xff", "x": NaN}'


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, valkey_url: str) -> Run:
    """Return a function that runs a command, with a broker."""
    monkeypatch.setenv("PAYREADY_REDIS_URL", valkey_url)
    for module in ("cli.webhook_commands", "cli.command_line", "cli.command_runtime"):
        monkeypatch.setattr(f"{module}.settings", settings.__wrapped__)
    with Redis.from_url(valkey_url) as redis:
        redis.delete("balances")
    return lambda *arguments, typed=None: CliRunner().invoke(app, list(arguments), input=typed)


@pytest.fixture
def quarantined(ledger: LedgerBuilder, run: Run, monkeypatch: pytest.MonkeyPatch) -> LedgerBuilder:
    """A ledger with three quarantined events, two of which this version can parse."""
    monkeypatch.setenv("PAYREADY_DATABASE_URL", ledger.url)
    with transaction(ledger.engine) as tx:
        quarantine.insert_events(
            tx, [UnparsedEvent(raw=raw, reason="x: y") for raw in (PARSEABLE_NOW, ROUTINE_NOW, ODD, ODD)], NOON
        )
    return ledger


def test_replay_applies_parseable_events_and_leaves_the_rest(
    quarantined: LedgerBuilder, run: Run, valkey_url: str
) -> None:
    """The balance has its original time of receipt, and `balances.apply` is enqueued once."""
    result = run("quarantine", "replay", "--all", "--json")
    assert json.loads(result.stdout) == {"applied": 1, "irrelevant": 1, "still_unparseable": 1}
    with quarantined.engine.connect() as connection:
        [balance] = connection.execute(BALANCE.select())
    assert (balance.balance_id, balance.event_id, balance.received_at) == ("bal_1", "evt_1", NOON)
    assert balance.due_at is not None
    with Redis.from_url(valkey_url) as redis:
        [message] = redis.lrange("balances", 0, -1)
    assert json.loads(message)["headers"]["task"] == "balances.apply"
    [remaining] = json.loads(run("quarantine", "list", "--json").stdout)
    assert remaining["bytes"] == len(ODD)
    assert (
        json.loads(run("quarantine", "replay", remaining["quarantine_id"], "--json").stdout)["still_unparseable"] == 1
    )


def test_replay_without_broker_leaves_balances_to_the_sweep(
    quarantined: LedgerBuilder, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The balance is due, and the sweep applies due balances."""
    monkeypatch.setenv("PAYREADY_REDIS_URL", "redis://127.0.0.1:1/0")
    result = run("quarantine", "replay", "--all")
    assert "applied 1, irrelevant 1, still unparseable 1" in result.stdout
    assert "the sweep will apply it" in result.stderr
    with quarantined.engine.connect() as connection:
        assert [row.due_at is not None for row in connection.execute(BALANCE.select())] == [True]


def test_quarantine_show_escapes_control_characters(quarantined: LedgerBuilder, run: Run) -> None:
    """A terminal obeys no byte of an event. Lists have no content of events."""
    lines = json.loads(run("quarantine", "list", "--json").stdout)
    [odd] = [line["quarantine_id"] for line in lines if line["bytes"] == len(ODD)]
    assert "balance.created" not in run("quarantine", "list").stdout
    result = run("quarantine", "show", odd).stdout
    assert r'"text": "\x1b[2J\xff", "x": NaN}' in result
    assert "x: y" in result
    assert json.loads(run("quarantine", "show", odd, "--json").stdout)["event"] == ODD.decode(errors="backslashreplace")


def test_quarantine_delete_removes_named_or_all_events(quarantined: LedgerBuilder, run: Run) -> None:
    """Without ids and without --all nothing is deleted. --all asks for confirmation."""
    assert run("quarantine", "delete").exit_code == 2
    assert run("quarantine", "delete", "evt_q_1", "--all").exit_code == 2
    assert run("quarantine", "delete", "evt_q_1").exit_code == 1
    first = json.loads(run("quarantine", "list", "--json").stdout)[0]["quarantine_id"]
    assert json.loads(run("quarantine", "delete", first, "--json").stdout) == {"deleted": 1}
    assert run("quarantine", "show", first).exit_code == 1
    assert run("quarantine", "delete", "--all", typed="n\n").exit_code == 1
    assert len(json.loads(run("quarantine", "list", "--json").stdout)) == 2
    assert run("quarantine", "delete", "--all", "--yes").stdout == "deleted 2 events\n"
    assert "empty" in run("quarantine", "list").stdout


# --- the subscription -------------------------------------------------------------------------------------------------


@pytest.fixture
def provider(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    """A provider that accepts our key, and an address that responds as `web` does."""
    with Simulator("http://127.0.0.1:9/", secret="s", api_key="qk_tests") as simulator:
        monkeypatch.setenv("PAYREADY_QUILTT_API_URL", simulator.url)
        monkeypatch.setenv("PAYREADY_QUILTT_API_KEY", simulator.api_key)
        monkeypatch.setenv("PAYREADY_WEBHOOK_URL", URL)
        monkeypatch.setattr("cli.webhook_commands.find_problem_by_test_delivery", lambda *_: None)
        yield simulator


def checked_problems() -> float:
    """Check the subscription, and return the gauge of its problems."""
    chosen = settings.__wrapped__()
    with runtime.subscriptions_client(chosen) as provider:
        log_subscription_problems_and_set_metric(provider, str(chosen.webhook_url))
    return float(metrics.SUBSCRIPTION_PROBLEMS())


def test_subscription_is_created_checked_repaired_and_deleted(
    provider: Simulator, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """`status` exits with 1 while there are problems. A second `subscribe` changes nothing."""
    missing = run("webhooks", "status")
    assert (missing.exit_code, missing.stdout) == (1, f"no subscription delivers to {URL}\n")
    assert checked_problems() == 1
    assert f"no subscription delivers to {URL}" in caplog.text

    created = json.loads(run("webhooks", "subscribe", "--json").stdout)
    assert created["action"] == "created"
    subscription_id = created["subscription"]["id"]
    assert run("webhooks", "status").stdout.endswith(f"{URL} responds, and receives all required event types\n")
    assert checked_problems() == 0
    assert json.loads(run("webhooks", "subscribe", "--json").stdout)["action"] == "unchanged"

    changed = {"disabled": True, "eventTypes": ["balance.created", "more"]}
    provider.http.patch(
        f"/v1/webhooks/subscriptions/{subscription_id}",
        json=changed,
        headers={"Authorization": f"Bearer {provider.api_key}"},
    ).raise_for_status()
    wrong = json.loads(run("webhooks", "status", "--json").stdout)["problems"]
    assert wrong == [
        f"{subscription_id} is disabled",
        f"{subscription_id} lacks the events {', '.join(REQUIRED_EVENT_TYPES[1:])}",
    ]
    assert checked_problems() == 2
    repaired = json.loads(run("webhooks", "subscribe", "--json").stdout)
    assert (repaired["action"], repaired["subscription"]["id"]) == ("repaired", subscription_id)
    assert repaired["subscription"]["event_types"] == ["balance.created", "more", *REQUIRED_EVENT_TYPES[1:]]
    assert checked_problems() == 0

    additional = json.loads(run("webhooks", "subscribe", "--additional", "--json").stdout)["subscription"]["id"]
    assert run("webhooks", "unsubscribe").exit_code == 1, "there are two"
    assert run("webhooks", "unsubscribe", subscription_id, "--disable").exit_code == 0
    assert checked_problems() == 0, "the additional one is enabled"
    assert run("webhooks", "unsubscribe", subscription_id).exit_code == 0
    assert run("webhooks", "unsubscribe").stdout == f"{additional}: deleted\n"
    assert run("webhooks", "unsubscribe").exit_code == 1


def test_unreachable_provider_is_an_error_and_gauge_is_nan(
    provider: Simulator, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Errors: a wrong key, an unreachable provider, a missing address."""
    monkeypatch.setenv("PAYREADY_QUILTT_API_KEY", "qk_wrong")
    assert "does not accept our API key" in run("webhooks", "status").stderr
    assert checked_problems() != checked_problems(), "not a number"
    assert "webhook_subscription.check_failed" in caplog.text
    monkeypatch.setenv("PAYREADY_QUILTT_API_URL", "http://127.0.0.1:1")
    assert "could not be requested" in run("webhooks", "subscribe").stderr
    monkeypatch.delenv("PAYREADY_WEBHOOK_URL")
    assert "PAYREADY_WEBHOOK_URL" in run("webhooks", "unsubscribe").stderr


@pytest.mark.parametrize(
    "serve", [respond(200, body=b'{"data":[]}'), respond(500), respond(200, body=b"<html>"), respond(204)]
)
def test_undocumented_response_is_an_error(serve: Callable[[socket.socket], None]) -> None:
    """No response is taken for a subscription without validation."""
    with (
        raw_server(serve) as server,
        SubscriptionsClient(server.url, SecretStr("k"), connect_timeout_s=1, read_timeout_s=1) as client,
        pytest.raises(CallFailed, match="not documented"),
    ):
        client.list_all()


def test_subscription_without_https_is_a_problem() -> None:
    """The settings reject it, too."""
    subscription = {"id": "whs_1", "targetUrl": "http://x", "eventTypes": list(REQUIRED_EVENT_TYPES)}
    assert find_problems_of_best_subscription([Subscription.model_validate(subscription)], "http://x") == [
        "http://x is not https"
    ]
