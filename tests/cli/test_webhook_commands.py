"""The commands about the webhook: the quarantine, and the subscription at the provider."""

import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from redis import Redis
from typer.testing import CliRunner

from cli.main import app
from config.settings import settings
from simulator.testing import Simulator
from tests.cli.conftest import NOON, Books
from webhook.events import BALANCE_CREATED, CONNECTION_LOST_EVENTS
from worker import metrics, runtime
from worker.errors import CallFailed
from worker.ledger import quarantine
from worker.ledger.engine import transaction
from worker.ledger.tables import BALANCE
from worker.quiltt.messages import UnparsedEvent
from worker.quiltt.subscriptions import (
    REQUIRED_EVENT_TYPES,
    Subscription,
    SubscriptionsClient,
    check_subscription,
    problems,
)

Run = Callable[..., Any]
URL = "https://payready.example/webhooks/quiltt"
RECORD = {"id": "bal_1", "accountId": "acct_1", "at": "2026-11-22T12:00:00Z", "source": "REFRESH"}
FIGURES = {"available": 1, "current": None, "limit": None}


def event(**record: Any) -> bytes:
    """A balance event as it comes."""
    return json.dumps({"id": "evt_1", "type": "balance.created", "record": {**RECORD, **record}}).encode()


UNDERSTOOD_NOW, ROUTINE_NOW = event(**FIGURES), event(source="SOME_NEW_WORD")
ODD = b'{"type": "balance.created", "text": "\x1b[2J\xff", "x": NaN}'


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, valkey_url: str) -> Run:
    """Runs a command, with a broker."""
    monkeypatch.setenv("PAYREADY_REDIS_URL", valkey_url)
    for module in ("cli.webhook_commands", "cli.command_line"):
        monkeypatch.setattr(f"{module}.settings", settings.__wrapped__)
    with Redis.from_url(valkey_url) as redis:
        redis.delete("balances")
    return lambda *words: CliRunner().invoke(app, list(words))


@pytest.fixture
def held(books: Books, run: Run, monkeypatch: pytest.MonkeyPatch) -> Books:
    """A ledger with three events in quarantine, that were not understood by an earlier version."""
    monkeypatch.setenv("PAYREADY_DATABASE_URL", books.url)
    with transaction(books.engine) as tx:
        quarantine.insert_events(tx, [UnparsedEvent(raw=raw, reason="x: y") for raw in (UNDERSTOOD_NOW, ROUTINE_NOW, ODD, ODD)], NOON)
    return books


def test_replay_hands_over_what_is_understood_now_and_leaves_the_rest(held: Books, run: Run, valkey_url: str) -> None:
    """The balance is in the ledger as of the moment when it came, and its application is enqueued, once."""
    said = run("quarantine", "replay", "--all", "--json")
    assert json.loads(said.stdout) == {"taken": 1, "not_ours": 1, "still_odd": 1}
    with held.engine.connect() as connection:
        [balance] = connection.execute(BALANCE.select())
    assert (balance.balance_id, balance.event_id, balance.received_at) == ("bal_1", "evt_1", NOON)
    assert balance.due_at is not None
    with Redis.from_url(valkey_url) as redis:
        [message] = redis.lrange("balances", 0, -1)
    assert json.loads(message)["headers"]["task"] == "balances.apply"
    [left] = json.loads(run("quarantine", "list", "--json").stdout)
    assert left["bytes"] == len(ODD)
    assert json.loads(run("quarantine", "replay", left["quarantine_id"], "--json").stdout)["still_odd"] == 1


def test_what_is_replayed_without_a_broker_is_kept_for_the_sweep(
    held: Books, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is due, and the sweep applies what is due."""
    monkeypatch.setenv("PAYREADY_REDIS_URL", "redis://127.0.0.1:1/0")
    said = run("quarantine", "replay", "--all")
    assert "1 taken, 1 not ours, 1 still not understood" in said.stdout
    assert "applied by the sweep" in said.stderr
    with held.engine.connect() as connection:
        assert [row.due_at is not None for row in connection.execute(BALANCE.select())] == [True]


def test_an_event_is_shown_whole_and_harmless(held: Books, run: Run) -> None:
    """To a terminal no byte of it is a command; in lists there is nothing of it."""
    lines = json.loads(run("quarantine", "list", "--json").stdout)
    [odd] = [line["quarantine_id"] for line in lines if line["bytes"] == len(ODD)]
    assert "balance.created" not in run("quarantine", "list").stdout
    said = run("quarantine", "show", odd).stdout
    assert r'"text": "\x1b[2J\xff", "x": NaN}' in said
    assert "x: y" in said
    assert json.loads(run("quarantine", "show", odd, "--json").stdout)["event"] == ODD.decode(errors="backslashreplace")


def test_what_is_dropped_is_gone(held: Books, run: Run) -> None:
    """One, or all; never by leaving the name out."""
    assert run("quarantine", "drop").exit_code == 2
    assert run("quarantine", "drop", "evt_q_1", "--all").exit_code == 2
    assert run("quarantine", "drop", "evt_q_1").exit_code == 1
    first = json.loads(run("quarantine", "list", "--json").stdout)[0]["quarantine_id"]
    assert json.loads(run("quarantine", "drop", first, "--json").stdout) == {"dropped": 1}
    assert run("quarantine", "show", first).exit_code == 1
    assert run("quarantine", "drop", "--all").stdout == "2 dropped\n"
    assert "empty" in run("quarantine", "list").stdout


def test_the_quarantine_is_kept_within_its_bounds(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """By age, by number and by size; the oldest go first."""

    def left() -> list[str]:
        with transaction(books.engine) as tx:
            quarantine.prune(tx, NOON)
            return [kept.event[:1].decode() for kept in quarantine.newest_events(tx, 10)]

    with transaction(books.engine) as tx:
        for age_days, name in enumerate(b"abcde"):
            quarantine.insert_events(tx, [UnparsedEvent(raw=bytes([name]) * 10, reason="x")], NOON - timedelta(days=age_days))
    assert left() == ["a", "b", "c", "d", "e"]
    monkeypatch.setattr(quarantine, "MAX_AGE", timedelta(days=3))
    assert left() == ["a", "b", "c", "d"]
    monkeypatch.setattr(quarantine, "MAX_EVENTS", 3)
    assert left() == ["a", "b", "c"]
    monkeypatch.setattr(quarantine, "MAX_BYTES", 29)
    assert left() == ["a", "b"]


# --- the subscription -------------------------------------------------------------------------------------------------


@pytest.fixture
def provider(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    """A provider that knows our key."""
    with Simulator("http://127.0.0.1:9/", secret="s", api_key="qk_tests") as simulator:
        monkeypatch.setenv("PAYREADY_QUILTT_API_URL", simulator.url)
        monkeypatch.setenv("PAYREADY_QUILTT_API_KEY", simulator.api_key)
        monkeypatch.setenv("PAYREADY_WEBHOOK_URL", URL)
        yield simulator


def watched() -> float:
    """The gauge, after a check as the beat has it made."""
    chosen = settings.__wrapped__()
    with runtime.subscriptions_client(chosen) as provider:
        check_subscription(provider, str(chosen.webhook_url))
    return float(metrics.SUBSCRIPTION_PROBLEMS())


def test_a_subscription_is_made_watched_mended_and_ended(
    provider: Simulator, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """Status says 1 and the check counts what is wrong until it is right; subscribing twice changes nothing."""
    missing = run("webhooks", "status")
    assert (missing.exit_code, missing.stdout) == (1, f"no subscription delivers to {URL}\n")
    assert watched() == 1
    assert f"no subscription delivers to {URL}" in caplog.text

    made = json.loads(run("webhooks", "subscribe", "--json").stdout)
    assert made["done"] == "made"
    one = made["subscription"]["id"]
    assert run("webhooks", "status").stdout.endswith(f"{URL} is subscribed to all that is needed\n")
    assert watched() == 0
    assert json.loads(run("webhooks", "subscribe", "--json").stdout)["done"] == "left as it was"

    changed = {"disabled": True, "eventTypes": ["balance.created", "more"]}
    provider.http.patch(
        f"/v1/webhooks/subscriptions/{one}", json=changed, headers={"Authorization": f"Bearer {provider.api_key}"}
    ).raise_for_status()
    wrong = json.loads(run("webhooks", "status", "--json").stdout)["flaws"]
    assert wrong == [f"{one} is disabled", f"{one} lacks the events {', '.join(REQUIRED_EVENT_TYPES[1:])}"]
    assert watched() == 2
    mended = json.loads(run("webhooks", "subscribe", "--json").stdout)
    assert (mended["done"], mended["subscription"]["id"]) == ("mended", one)
    assert mended["subscription"]["event_types"] == ["balance.created", "more", *REQUIRED_EVENT_TYPES[1:]]
    assert watched() == 0

    another = json.loads(run("webhooks", "subscribe", "--another", "--json").stdout)["subscription"]["id"]
    assert run("webhooks", "unsubscribe").exit_code == 1, "which of the two?"
    assert run("webhooks", "unsubscribe", one, "--disable").exit_code == 0
    assert watched() == 0, "the other does"
    assert run("webhooks", "unsubscribe", one).exit_code == 0
    assert run("webhooks", "unsubscribe").stdout == f"{another} is deleted\n"
    assert run("webhooks", "unsubscribe").exit_code == 1


def test_what_cannot_be_asked_is_said_and_not_guessed(
    provider: Simulator, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong key, no provider, no address; the gauge tells that nothing is known."""
    monkeypatch.setenv("PAYREADY_QUILTT_API_KEY", "qk_wrong")
    assert "does not accept our API key" in run("webhooks", "status").stderr
    assert watched() != watched(), "not a number"
    assert "webhook_subscription.check_failed" in caplog.text
    monkeypatch.setenv("PAYREADY_QUILTT_API_URL", "http://127.0.0.1:1")
    assert "could not be requested" in run("webhooks", "subscribe").stderr
    monkeypatch.delenv("PAYREADY_WEBHOOK_URL")
    assert "PAYREADY_WEBHOOK_URL" in run("webhooks", "unsubscribe").stderr


def _always(answer: httpx.Response, _: httpx.Request) -> httpx.Response:
    return answer


def test_an_answer_that_is_not_documented_is_no_subscription() -> None:
    """Whatever it is, it is said to be so."""
    for answer in (httpx.Response(200, json={"data": []}), httpx.Response(500), httpx.Response(200, text="<html>")):
        kept = SubscriptionsClient("http://x", SecretStr("k"), connect_timeout_s=1, read_timeout_s=1)
        kept._http_client = httpx.Client(transport=httpx.MockTransport(partial(_always, answer)), base_url="http://x")
        with pytest.raises(CallFailed, match="not documented"), kept:
            kept.list_all()


def test_we_subscribe_to_just_the_events_that_the_webhook_reads() -> None:
    """One that nobody reads is noise; one that is left out never comes."""
    assert set(REQUIRED_EVENT_TYPES) == {BALANCE_CREATED, "account.reconnected", *CONNECTION_LOST_EVENTS}


def test_only_https_will_do() -> None:
    """The settings refuse all else; so does the check."""
    given = {"id": "whs_1", "targetUrl": "http://x", "eventTypes": list(REQUIRED_EVENT_TYPES)}
    assert problems([Subscription.model_validate(given)], "http://x") == ["http://x is not https"]
