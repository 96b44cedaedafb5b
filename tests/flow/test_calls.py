"""Invariants 5 and 6: no blind retry of a call that may have been accepted; one refresh in flight per account."""

import itertools
from datetime import timedelta

import pytest
from sqlalchemy.exc import IntegrityError

from tests.support.in_process import START, InProcessSystem
from worker import flow
from worker.errors import CallFailed, CallNotSent, CallRejected, CallResultUnknown, RateLimited, Reason
from worker.flow import CALL_ENQUEUE_RETRY
from worker.ledger import refreshes
from worker.ledger.engine import transaction
from worker.ledger.refreshes import RefreshRecord
from worker.rules import states
from worker.rules.states import RefreshState

A = "acct_calls"


@pytest.mark.parametrize("failure", [CallNotSent("no connection: connect error"), RateLimited("rate limit", None)])
def test_a_call_that_was_provably_not_accepted_is_made_again_with_backoff(
    payready: InProcessSystem, failure: CallNotSent | RateLimited
) -> None:
    """After 1, 2, 4, ... seconds, each try with an entry of its own that is void."""
    payready.provider.script[A] = [failure] * 4
    payready.initiate("p1", A, timeout_s=120)
    payready.run_tasks()
    tries = [payready.clock.now]
    while len(payready.provider.calls) < 5:
        before = len(payready.provider.calls)
        payready.pass_time(1)
        if len(payready.provider.calls) > before:
            tries.append(payready.clock.now)
    pauses = [(later - earlier).total_seconds() for earlier, later in itertools.pairwise(tries)]
    assert pauses == [1, 2, 4, 8]
    assert payready.fees(A) == [f"{n} {state}" for n in range(1, 5) for state in ("pending", "void")] + [
        "5 pending",
        "5 posted",
    ]
    payready.balance(A)
    payready.run_tasks()
    assert payready.outcome("p1")["fee"]["amount"] == "0.100000"


def test_backoff_ends_at_thirty_seconds() -> None:
    """1, 2, 4, 8, 16, 30, 30, ..."""
    assert [states.backoff(n).total_seconds() for n in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert states.backoff(10_000) == timedelta(seconds=30)


def test_a_rate_limit_is_waited_for_as_long_as_the_provider_says(payready: InProcessSystem) -> None:
    """Not before its reset."""
    payready.provider.script[A] = [RateLimited("rate limit", START + timedelta(seconds=7))]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.pass_time(6)
    assert payready.provider.calls == [A]
    payready.pass_time(1)
    assert payready.provider.calls == [A, A]


def test_a_rate_limit_that_never_ends_is_believed_for_a_minute(payready: InProcessSystem) -> None:
    """The provider's clock may be wrong."""
    payready.provider.script[A] = [RateLimited("rate limit", START + timedelta(days=900))]
    payready.initiate("p1", A, timeout_s=300)
    payready.run_tasks()
    payready.pass_time(59)
    assert payready.provider.calls == [A]
    payready.pass_time(2)
    assert payready.provider.calls == [A, A]


def test_a_message_to_call_that_comes_too_early_or_twice_makes_no_call(payready: InProcessSystem) -> None:
    """While the refresh is put off, and after it was called."""
    payready.provider.script[A] = [RateLimited("rate limit", None)]
    entrance = payready.initiate("p1", A)
    payready.run_tasks()
    for _ in range(3):
        payready.queue.calls.append(flow.RefreshCall(account_id=A, refresh_id=str(entrance.refresh_id)))
        payready.run_tasks()
    assert payready.provider.calls == [A]
    payready.pass_time(1)
    for _ in range(3):
        payready.queue.calls.append(flow.RefreshCall(account_id=A, refresh_id=str(entrance.refresh_id)))
        payready.run_tasks()
    assert payready.provider.calls == [A, A]


def test_an_unknown_fate_is_given_a_grace_and_then_one_more_call(payready: InProcessSystem) -> None:
    """Not at once: the event may come. Then once more, and never a third time."""
    payready.provider.script[A] = [CallResultUnknown("timeout")] * 9
    payready.initiate("p1", A, timeout_s=3600)
    payready.run_tasks()
    payready.pass_time(14)
    assert payready.provider.calls == [A]
    payready.pass_time(2)
    assert payready.provider.calls == [A, A]
    payready.pass_time(600)
    assert payready.provider.calls == [A, A]
    assert payready.fees(A) == ["1 pending", "2 pending"]
    assert payready.refreshes(A) == ["unanswered"]


def test_an_event_within_the_grace_spares_the_second_call(payready: InProcessSystem) -> None:
    """The call was accepted after all."""
    payready.provider.script[A] = [CallResultUnknown("reset")]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.pass_time(10)
    payready.balance(A)
    payready.run_tasks()
    payready.pass_time(120)
    assert payready.state("p1") == "released"
    assert payready.provider.calls == [A]


def test_an_event_between_the_two_calls_spares_the_second(payready: InProcessSystem) -> None:
    """It was already enqueued when the balance came."""
    payready.provider.script[A] = [CallResultUnknown("reset")]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.clock.advance(15)
    again = flow.sweep(payready.rt)
    assert again.calls
    payready.balance(A)
    payready.run_tasks()
    payready.queue.merge(again)
    payready.run_tasks()
    assert payready.provider.calls == [A]
    assert payready.refreshes(A) == ["answered"]


def test_no_second_call_when_nobody_has_time_left(payready: InProcessSystem) -> None:
    """The payment expired within the grace."""
    payready.provider.script[A] = [CallResultUnknown("timeout")]
    payready.initiate("p1", A, timeout_s=10)
    payready.run_tasks()
    payready.pass_time(120)
    assert payready.provider.calls == [A]


def test_a_second_call_that_is_put_off_stays_the_second(payready: InProcessSystem) -> None:
    """Provably unsent calls do not count, however many; calls of unknown fate do."""
    payready.provider.script[A] = [
        CallResultUnknown("timeout"),
        CallNotSent("no"),
        CallNotSent("no"),
        CallResultUnknown("timeout"),
        202,
    ]
    payready.initiate("p1", A, timeout_s=600)
    payready.run_tasks()
    payready.pass_time(300)
    assert len(payready.provider.calls) == 4
    assert [entry for entry in payready.fees(A) if "pending" not in entry] == ["2 void", "3 void"]


@pytest.mark.parametrize(
    "reason", [Reason.ACCOUNT_NOT_FOUND, Reason.ACCOUNT_UNSUPPORTED, Reason.CONNECTION_INACTIVE, Reason.NOT_AUTHORIZED]
)
def test_a_refusal_fails_all_who_wait_on_the_account_and_nobody_else(payready: InProcessSystem, reason: Reason) -> None:
    """At once, those too who joined while the call was out."""

    def refuse() -> CallFailed:
        payready.initiate("p3", A)
        return CallRejected(400, reason, "no")

    payready.provider.script[A] = [refuse]
    payready.initiate("p1", A)
    payready.initiate("p2", A)
    payready.initiate("other", "acct_other")
    payready.run_tasks()
    for payment_id in ("p1", "p2", "p3"):
        assert payready.outcome(payment_id) == {"payment_id": payment_id, "reason": reason.value, "detail": "no"}
    assert payready.state("other") == "waiting"
    assert payready.provider.calls.count(A) == 1


def test_after_a_refusal_the_next_payment_is_called_for_anew(payready: InProcessSystem) -> None:
    """The user may have reconnected."""
    payready.provider.script[A] = [CallRejected(403, Reason.CONNECTION_INACTIVE, "inactive")]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.initiate("p2", A)
    payready.run_tasks()
    assert payready.provider.calls == [A, A]
    assert payready.state("p2") == "waiting"


def test_payments_that_come_while_a_call_is_out_share_it(payready: InProcessSystem) -> None:
    """Fifty payments, one call, one fee."""
    for number in range(50):
        payready.initiate(f"p{number}", A)
        payready.run_tasks()
        payready.clock.advance(0.1)
    assert payready.provider.calls == [A]
    payready.balance(A)
    payready.run_tasks()
    assert {payready.outcome(f"p{number}")["shared_by"] for number in range(50)} == {50}


def test_at_most_one_refresh_of_an_account_is_in_flight_even_if_the_code_forgets(payready: InProcessSystem) -> None:
    """The database itself refuses a second one."""
    with transaction(payready.engine) as tx:
        numbered = ((1, RefreshState.ACCEPTED), (2, RefreshState.UNCERTAIN), (3, RefreshState.REQUESTED))
        flights = [RefreshRecord(refresh_id=f"ref_{n}", account_id=A, state=state) for n, state in numbered]
        assert refreshes.insert_refreshes(tx, flights) == {"ref_1", "ref_3"}
        waiting = refreshes.find(tx, "ref_3")
        assert waiting is not None
    with pytest.raises(IntegrityError), transaction(payready.engine) as tx:
        refreshes.transition(tx, waiting, states.RefreshEvent.CLAIM, None)


def test_no_call_is_made_while_its_price_is_unknown(payready: InProcessSystem) -> None:
    """The provider could not be asked whose key ours is: put off, and asked again."""
    payready.provider.asked = [CallNotSent("the provider could not be asked about our key")]
    payready.initiate("p1", A, timeout_s=60)
    payready.run_tasks()
    assert payready.provider.calls == []
    assert payready.fees(A) == []
    payready.pass_time(3)
    assert payready.provider.calls == [A]
    assert payready.provider.introspections == 2


def test_a_wrong_key_fails_the_payments_without_a_call(payready: InProcessSystem) -> None:
    """`not_authorized`, and nothing to pay."""
    payready.provider.asked = [CallRejected(401, Reason.NOT_AUTHORIZED, "the provider does not accept our API key")]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert payready.state("p1") == "not_authorized"
    assert payready.provider.calls == []
    assert payready.fees(A) == []


def test_a_production_key_in_development_makes_no_call(payready: InProcessSystem) -> None:
    """It would be billed."""
    payready.provider.asked = ["PRODUCTION"]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert payready.state("p1") == "not_authorized"
    assert "PAYREADY_ALLOW_PRODUCTION_KEY" in payready.outcome("p1")["detail"]
    assert payready.provider.calls == []


def test_a_call_that_nobody_has_a_worker_for_is_enqueued_again_and_again_but_not_each_second(
    payready: InProcessSystem,
) -> None:
    """A queue that stands still does not grow by the looking."""
    payready.provider.script[A] = [RateLimited("rate limit", None)]
    payready.initiate("p1", A, timeout_s=3600)
    payready.run_tasks()
    enqueued = 0
    for _ in range(120):
        payready.clock.advance(1)
        enqueued += len(flow.expire_due_payments(payready.rt).calls)
        enqueued += sum(call.has_slot for call in flow.sweep(payready.rt).calls)
    assert 120 / CALL_ENQUEUE_RETRY.total_seconds() - 1 <= enqueued <= 120 / CALL_ENQUEUE_RETRY.total_seconds() + 2
