"""What a step leaves to be done becomes messages to Celery."""

from datetime import timedelta
from typing import Any

import pytest

from tasks import dispatch
from tasks.app import app
from worker.flow import BalancePoll, FollowUp, RefreshCall


def test_what_many_payments_of_a_round_want_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crowd on one account that finds a balance there wants it applied once, not a thousand times."""
    sent: list[object] = []
    monkeypatch.setattr(dispatch, "_enqueue", sent.extend)
    todo, later = FollowUp(), timedelta(seconds=1)
    for _ in range(3):
        todo.merge(
            FollowUp(
                balances_to_apply=["bal_1", "bal_2"],
                calls=[
                    RefreshCall(account_id="acct_1", refresh_id="ref_1"),
                    RefreshCall(account_id="acct_2", refresh_id="ref_2", has_slot=True, delay=later),
                ],
            )
        )
    dispatch.dispatch(todo)
    assert sent.count(("balances.apply", ("bal_1",), None)) == 1
    assert sent.count(("balances.apply", ("bal_2",), None)) == 1
    assert sent.count(("balances.refresh", ("acct_1", "ref_1"), None)) == 1


def test_a_message_of_ours_is_the_one_that_celery_would_send() -> None:
    """As `app.send_task` makes it: an upgrade of Celery may change what that does."""
    later = timedelta(seconds=1)
    todo = FollowUp(
        calls=[
            RefreshCall(account_id="acct_1", refresh_id="ref_1"),
            RefreshCall(account_id="acct_1", refresh_id="ref_1", has_slot=True, delay=later),
        ],
        balance_polls=[BalancePoll(account_id="acct_1", profile_id="p_1", delay=later)],
        balances_to_apply=["bal_1"],
    )
    ours = [*dispatch._messages(todo), ("outcomes.deliver", (["task_1"],), None)]
    with app.connection_for_write("memory://") as connection, app.amqp.Producer(connection) as producer:

        def taken(name: str) -> dict[str, Any]:
            message = connection.SimpleQueue(app.conf.task_routes[name]["queue"]).get(block=False)
            new = {"id": ..., "root_id": ..., "eta": message.headers["eta"] and "later"}
            delivery_info = {**message.delivery_info, "delivery_tag": ...}
            return {"headers": {**message.headers, **new}, "body": message.payload, "where": delivery_info}

        for message in ours:
            name, arguments, countdown_s = message
            app.send_task(name, arguments, countdown=countdown_s, ignore_result=True, producer=producer)
            theirs = taken(name)
            dispatch._send(producer, message, ())
            assert taken(name) == theirs
