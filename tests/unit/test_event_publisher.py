"""Results of the backend `rpc`, which are messages."""

from celery import Celery, Task
from kombu import Connection

from tasks import suspension

CONTINUATION = {"version": 1, "id": "task_1", "task": "payments.initiate", "reply_to": "replies", "suspended_at": 0.0}


class Initiate(Task):  # type: ignore[misc, type-arg, unused-ignore]
    """The task of the continuation."""

    name = "payments.initiate"


def test_outcome_is_sent_to_the_reply_queue() -> None:
    """The continuation has its name."""
    app = Celery("test", broker="memory://", backend="rpc://", set_as_current=False)
    app.conf.worker_send_task_events = False
    app.tasks.register(Initiate())
    with Connection("memory://") as connection:
        replies = connection.SimpleQueue("replies")
        finished = suspension.FinishedTask(continuation=CONTINUATION, result={"state": "released"})
        suspension.finish_without_callbacks(app, [finished])
        message = replies.get(timeout=5)
    assert (message.payload["task_id"], message.payload["result"]) == ("task_1", {"state": "released"})
