"""Messages that Celery has are not lost when the worker stops."""

from typing import Any
from unittest.mock import MagicMock

from celery.bootsteps import CLOSE, RUN

from tasks.batch_processing import PoolCapacity
from tasks.celery_handover import CeleryHandover
from tests.support.fake_source import FakeSource


def test_message_that_is_handed_over_during_a_stop_is_given_back() -> None:
    """The pool of a worker that stops accepts no task. The last act of its event loop is to run what is pending."""
    message = MagicMock(queue="payments", task_name="payments.initiate", eta=None)
    pending = list[tuple[Any, ...]]()
    consumer = MagicMock()
    consumer.call_soon = lambda *call: pending.append(call)
    strategy = consumer.strategies["payments.initiate"]
    handover = CeleryHandover(consumer, PoolCapacity(1))
    handover.hand_over(FakeSource(), [message])
    [(function, handed)] = pending
    consumer.blueprint.state = CLOSE
    function(handed)
    strategy.assert_not_called()
    assert handover.forget_unfinished("payments") == [message.fetched.tag]
    consumer.blueprint.state = RUN
    function(handed)
    strategy.assert_called_once()
