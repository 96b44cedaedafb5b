"""Dispatch turns follow-ups into Celery messages."""

import json
from base64 import b64decode
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, cast

import pytest
from celery import Celery
from redis import Redis

from config.celery_config import celery_settings
from config.settings import settings
from tasks import dispatch, sending
from tasks.sending import NewMessage
from worker.flow import AccountRead, BalancePoll, FollowUp, RefreshCall

LATER = timedelta(seconds=1)
MESSAGES = [
    *dispatch._messages_except_deliveries(
        FollowUp(
            calls=[
                RefreshCall(account_id="acct_1", refresh_id="ref_1"),
                RefreshCall(account_id="acct_1", refresh_id="ref_1", has_slot=True, delay=LATER),
            ],
            balance_polls=[BalancePoll(account_id="acct_1", profile_id="p_1", delay=LATER)],
            account_reads=[AccountRead(account_id="acct_1", profile_id="p_1", refresh_id="ref_1")],
            balances_to_apply=["bal_1"],
        )
    ),
    NewMessage(task_name="outcomes.deliver", arguments=(["task_1"],)),
]
"""One message of each kind."""


def test_duplicate_follow_ups_are_enqueued_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many payments of a batch may need the same call or balance."""
    sent: list[NewMessage] = []
    monkeypatch.setattr(dispatch, "send_messages", lambda _, messages: sent.extend(messages))
    follow_up, later = FollowUp(), timedelta(seconds=1)
    for _ in range(3):
        follow_up = follow_up.plus(
            FollowUp(
                balances_to_apply=["bal_1", "bal_2"],
                calls=[
                    RefreshCall(account_id="acct_1", refresh_id="ref_1"),
                    RefreshCall(account_id="acct_2", refresh_id="ref_2", has_slot=True, delay=later),
                ],
            )
        )
    dispatch.dispatch(follow_up)
    tasks = [(message.task_name, message.arguments) for message in sent]
    assert tasks.count(("balances.apply", ("bal_1",))) == 1
    assert tasks.count(("balances.apply", ("bal_2",))) == 1
    assert tasks.count(("balances.refresh", ("acct_1", "ref_1"))) == 1


def comparable(stored: bytes | str) -> dict[str, Any]:
    """Return a stored message without what differs from message to message."""
    message = json.loads(stored)
    headers, properties = message["headers"], message["properties"]
    changing = {"id": ..., "root_id": ..., "eta": headers["eta"] and "set"}
    of_sender = {"correlation_id": ..., "delivery_tag": ..., "reply_to": ..., "delivery_info": ...}
    body = b64decode(message["body"])
    return {**message, "body": body, "headers": {**headers, **changing}, "properties": {**properties, **of_sender}}


@pytest.fixture
def valkey_app(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Celery, Redis]]:
    """Return payready's app on an empty Valkey, with a client."""
    monkeypatch.setenv("PAYREADY_REDIS_URL", valkey_url)
    settings.cache_clear()
    sending._redis.cache_clear()
    own = Celery("payready", set_as_current=False)
    own.conf.update(celery_settings(settings()))
    with Redis.from_url(valkey_url) as client, own:
        client.flushdb()
        yield own, client
    settings.cache_clear()
    sending._redis.cache_clear()


@pytest.mark.parametrize("send", [sending._push, sending._publish])
@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: f"{message.task_name} {message.countdown_s}")
def test_sent_message_equals_the_message_of_send_task(
    valkey_app: tuple[Celery, Redis], message: NewMessage, send: Callable[..., None]
) -> None:
    """A new release of Celery may change the messages of `app.send_task`."""
    own, client = valkey_app
    own.send_task(message.task_name, message.arguments, countdown=message.countdown_s, ignore_result=True)
    send(own, [message])
    sent, expected = cast(list[bytes], client.lrange(message.queue, 0, -1))
    assert comparable(sent) == comparable(expected)


def test_messages_are_fetched_in_the_order_in_which_they_were_sent(valkey_app: tuple[Celery, Redis]) -> None:
    own, client = valkey_app
    calls = [NewMessage(task_name="balances.refresh", arguments=(f"acct_{n}", "ref_1")) for n in range(3)]
    sending.send_messages(own, calls)
    fetched = [json.loads(cast(bytes, client.rpop("refreshes")))["headers"]["argsrepr"] for _ in calls]
    assert fetched == [repr(call.arguments) for call in calls]
