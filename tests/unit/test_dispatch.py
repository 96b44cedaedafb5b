"""Dispatch turns follow-ups into Celery messages."""

from datetime import timedelta
from typing import Any

import pytest

from tasks import dispatch
from tasks.app import app
from worker.flow import AccountRead, BalancePoll, FollowUp, RefreshCall


def test_duplicate_follow_ups_are_enqueued_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many payments of a batch may need the same call or balance."""
    sent: list[dispatch.TaskMessage] = []
    monkeypatch.setattr(dispatch, "_enqueue", sent.extend)
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
    tasks = [(message.name, message.arguments) for message in sent]
    assert tasks.count(("balances.apply", ("bal_1",))) == 1
    assert tasks.count(("balances.apply", ("bal_2",))) == 1
    assert tasks.count(("balances.refresh", ("acct_1", "ref_1"))) == 1


def test_sent_message_equals_the_message_of_send_task() -> None:
    """A new release of Celery may change the messages of `app.send_task`."""
    later = timedelta(seconds=1)
    follow_up = FollowUp(
        calls=[
            RefreshCall(account_id="acct_1", refresh_id="ref_1"),
            RefreshCall(account_id="acct_1", refresh_id="ref_1", has_slot=True, delay=later),
        ],
        balance_polls=[BalancePoll(account_id="acct_1", profile_id="p_1", delay=later)],
        account_reads=[AccountRead(account_id="acct_1", profile_id="p_1", refresh_id="ref_1")],
        balances_to_apply=["bal_1"],
    )
    deliver = dispatch.TaskMessage(name="outcomes.deliver", arguments=(["task_1"],))
    messages = [*dispatch._messages_except_deliveries(follow_up), deliver]
    with app.connection_for_write("memory://") as connection, app.amqp.Producer(connection) as producer:

        def fetch(name: str) -> dict[str, Any]:
            message = connection.SimpleQueue(app.conf.task_routes[name]["queue"]).get(block=False)
            changing = {"id": ..., "root_id": ..., "eta": message.headers["eta"] and "set"}
            delivery_info = {**message.delivery_info, "delivery_tag": ...}
            return {"headers": {**message.headers, **changing}, "body": message.payload, "delivery_info": delivery_info}

        for message in messages:
            options = {"countdown": message.countdown_s, "ignore_result": True, "producer": producer}
            app.send_task(message.name, message.arguments, **options)
            expected = fetch(message.name)
            dispatch._send_message(producer, message, declare_queue=True)
            assert fetch(message.name) == expected
