"""What a step leaves to be done becomes messages to Celery."""

from datetime import timedelta

import pytest

from tasks import delivery
from worker.flow import Next


def test_what_many_payments_of_a_round_want_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crowd on one account that finds a balance there wants it applied once, not a thousand times."""
    sent: list[object] = []
    monkeypatch.setattr(delivery, "_enqueue", sent.extend)
    todo, later = Next(), timedelta(seconds=1)
    for _ in range(3):
        todo.add(Next(apply=["bal_1", "bal_2"], call=[("acct_1", "ref_1")], call_later=[("acct_2", "ref_2", later)]))
    delivery.carry_out(todo)
    assert sent.count(("payments.release", ("bal_1",), None)) == 1
    assert sent.count(("payments.release", ("bal_2",), None)) == 1
    assert sent.count(("balances.refresh", ("acct_1", "ref_1"), None)) == 1
