"""Follow-ups become Celery messages."""

from datetime import timedelta
from typing import Any

import pytest

from tasks import dispatch
from tasks.app import app
from worker.flow import BalancePoll, FollowUp, RefreshCall


def test_dispatch_sends_equal_follow_ups_of_a_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many payments of one account need one apply of its balance, not one each."""
    sent: list[object] = []
    monkeypatch.setattr(dispatch, "_enqueue", sent.extend)
    follow_up, later = FollowUp(), timedelta(seconds=1)
    for _ in range(3):
        follow_up.merge(
            FollowUp(
                balances_to_apply=["bal_1", "bal_2"],
                calls=[
                    RefreshCall(account_id="acct_1", refresh_id="ref_1"),
                    RefreshCall(account_id="acct_2", refresh_id="ref_2", has_slot=True, delay=later),
                ],
            )
        )
    dispatch.dispatch(follow_up)
    assert sent.count(("balances.apply", ("bal_1",), None)) == 1
    assert sent.count(("balances.apply", ("bal_2",), None)) == 1
    assert sent.count(("balances.refresh", ("acct_1", "ref_1"), None)) == 1


def test_message_equals_the_one_that_celery_sends() -> None:
    """The reference is `app.send_task`: an upgrade of Celery may change its messages."""
    later = timedelta(seconds=1)
    follow_up = FollowUp(
        calls=[
            RefreshCall(account_id="acct_1", refresh_id="ref_1"),
            RefreshCall(account_id="acct_1", refresh_id="ref_1", has_slot=True, delay=later),
        ],
        balance_polls=[BalancePoll(account_id="acct_1", profile_id="p_1", delay=later)],
        balances_to_apply=["bal_1"],
    )
    messages = [*dispatch._messages(follow_up), ("outcomes.deliver", (["task_1"],), None)]
    with app.connection_for_write("memory://") as connection, app.amqp.Producer(connection) as producer:

        def fetch_message(name: str) -> dict[str, Any]:
            message = connection.SimpleQueue(app.conf.task_routes[name]["queue"]).get(block=False)
            new = {"id": ..., "root_id": ..., "eta": message.headers["eta"] and "later"}
            delivery_info = {**message.delivery_info, "delivery_tag": ...}
            return {"headers": {**message.headers, **new}, "body": message.payload, "where": delivery_info}

        for message in messages:
            name, arguments, countdown_s = message
            app.send_task(name, arguments, countdown=countdown_s, ignore_result=True, producer=producer)
            celery_message = fetch_message(name)
            dispatch._send(producer, message, ())
            assert fetch_message(name) == celery_message
