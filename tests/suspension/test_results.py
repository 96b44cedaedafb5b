"""The result of a payment is a Celery result, and the task can be revoked like one."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery, chord
from celery.canvas import Signature

from tests.support.system import System, eventually
from tests.suspension.primitive_runs import Received, quiet_account, send_balance
from tests.suspension.primitives import Kit

RESULT_EXPIRES_S = 86_400
Raised = tuple[str, tuple[Any, ...]]


@pytest.fixture
def kit(service: Celery, request: pytest.FixtureRequest) -> Kit:
    """Payments on an account of the test's own, whose balance comes when the test sends it."""
    return Kit(service, "payments.initiate", "payments", quiet_account(), request.node.name, fails=False)


@pytest.fixture
def notes(kit: Kit, received: Received) -> Callable[[], list[str]]:
    """The notes that were called in this test so far."""
    return lambda: sorted(note["mark"] for note in received[kit.tag])


@pytest.fixture
def key(service: Celery) -> Callable[[Any], bytes]:
    """The Redis key of a result."""
    return lambda result: bytes(service.backend.get_key_for_task(result.id))


def waits(result: Any) -> bool:
    return bool(result.state == "WAITING")


def raised_by(result: Any) -> Raised:
    """The name and the arguments of the exception that a result raises."""
    with pytest.raises(Exception) as raised:  # its class is made from its name alone
        result.get(timeout=15)
    return type(raised.value).__name__, raised.value.args


def test_a_waiting_result_tells_what_it_waits_for(payready: System, kit: Kit) -> None:
    """The state is WAITING, with account, refresh and deadline; it is not ready, and has neither failed nor not."""
    result = kit.pay().apply_async()
    eventually(lambda: waits(result))
    row = payready.payment(kit.payments[0])
    meta = result.info
    assert meta["account_id"] == kit.account_id
    assert meta["refresh_id"].startswith("ref_")
    assert datetime.fromisoformat(meta["deadline"]) == row["deadline"]
    assert (result.ready(), result.successful(), result.failed()) == (False, False, False)


def test_get_returns_the_outcome_when_the_balance_comes(payready: System, kit: Kit) -> None:
    """`get` waits for the webhook; the result is ready then, and stays until it is forgotten."""
    result = kit.pay().apply_async()
    eventually(lambda: waits(result))
    send_balance(payready, kit.account_id)
    outcome = result.get(timeout=15)
    assert (outcome["payment_id"], outcome["state"]) == (kit.payments[0], "released")
    assert (result.ready(), result.successful(), result.failed()) == (True, True, False)
    result.forget()
    assert payready.service.AsyncResult(result.id).state == "PENDING"


def test_get_raises_reason_and_detail_when_the_deadline_comes(kit: Kit) -> None:
    """The exception is `PaymentNotReady(reason, detail)`, in a process that knows no such class too."""
    job = kit.job() | {"timeout_s": 1}
    result = kit.built(kwargs=job).apply_async()
    name, (reason, detail) = raised_by(result)
    assert (name, reason) == ("PaymentNotReady", "timeout")
    assert detail.startswith("no balance arrived within 1 s")
    assert (result.ready(), result.successful(), result.failed()) == (True, False, True)


def test_results_are_kept_as_long_as_configured(
    payready: System, service: Celery, kit: Kit, key: Callable[[Any], bytes]
) -> None:
    """Redis forgets WAITING, SUCCESS and FAILURE alike after `result_expires`."""
    good = kit.pay().apply_async()
    bad = kit.built(kwargs=kit.job("bad") | {"amount": "9999.00"}).apply_async()
    eventually(lambda: waits(good) and waits(bad))
    client = service.backend.client
    assert RESULT_EXPIRES_S - 60 < client.ttl(key(good)) <= RESULT_EXPIRES_S
    send_balance(payready, kit.account_id)
    good.get(timeout=15)
    raised_by(bad)
    for result in (good, bad):
        assert RESULT_EXPIRES_S - 60 < client.ttl(key(result)) <= RESULT_EXPIRES_S


def test_an_ignored_result_is_written_nowhere(
    payready: System, service: Celery, kit: Kit, notes: Callable[[], list[str]], key: Callable[[Any], bytes]
) -> None:
    """With `ignore_result` neither WAITING nor the outcome reaches the result backend; callbacks are called."""
    result = kit.pay(ignore_result=True, link=kit.note("next")).apply_async()
    payready.payment(kit.payments[0])
    send_balance(payready, kit.account_id)
    eventually(lambda: notes() == ["next"])
    assert not service.backend.client.exists(key(result))


def test_a_job_that_expired_in_the_queue_is_never_begun(payready: System, kit: Kit) -> None:
    """Celery revokes it, as any task; no payment is written down."""
    result = kit.pay(expires=datetime.now(UTC) - timedelta(seconds=5)).apply_async()
    assert raised_by(result)[0] == "TaskRevokedError"
    assert not payready.rows("SELECT 1 FROM payment WHERE payment_id = :id", id=kit.payments[0])


def _revoke(kit: Kit, result: Any) -> None:
    result.revoke()


def _terminate(kit: Kit, result: Any) -> None:
    result.revoke(terminate=True)


def _cancel(kit: Kit, result: Any) -> None:
    cancel = kit.app.signature("payments.cancel", args=(kit.payments[0],), queue="payments")
    assert [cancel.clone().apply_async().get(timeout=15) for _ in range(2)] == [True, False]


@pytest.mark.parametrize("give_up", [_revoke, _terminate, _cancel])
def test_a_waiting_payment_can_be_given_up(
    payready: System, kit: Kit, notes: Callable[[], list[str]], give_up: Callable[[Kit, Any], None]
) -> None:
    """Revoked or cancelled it fails as `cancelled`, errbacks run, and the balance that comes later releases nothing."""
    body = kit.note("body", link_error=kit.note("body-sorry"))
    header = [kit.pay(link=kit.note("next"), link_error=kit.note("sorry")), kit.note("x")]
    payment = chord(header, body, app=kit.app).apply_async().parent.results[0]
    eventually(lambda: waits(payment) and "x" in notes())
    give_up(kit, payment)
    assert raised_by(payment) == ("PaymentNotReady", ("cancelled", "the payments service cancelled the payment"))
    eventually(lambda: notes() == ["body-sorry", "sorry", "x"])
    other = kit.pay("other").apply_async()
    eventually(lambda: waits(other))
    send_balance(payready, kit.account_id)
    other.get(timeout=15)
    assert payready.payment(kit.payments[0])["state"] == "failed"
    assert payready.service.AsyncResult(payment.id).state == "FAILURE"
    assert notes() == ["body-sorry", "sorry", "x"]


def _unknown_field(kit: Kit) -> Signature:
    return kit.built(kwargs=kit.job() | {"amuont": "1.00"})


def _no_mapping(kit: Kit) -> Signature:
    return kit.built(args=([1, 2],))


def _conflict(kit: Kit) -> Signature:
    first = kit.pay().apply_async()
    eventually(lambda: waits(first))
    return kit.built(kwargs=kit.job() | {"amount": "0.02"})


@pytest.mark.parametrize(
    ("payment", "exception"),
    [
        (_unknown_field, ("InvalidJob", ("amuont: Extra inputs are not permitted",))),
        (_no_mapping, ("InvalidJob", ("the positional argument must be a job, a mapping, not list",))),
        (
            _conflict,
            ("PaymentNotReady", ("conflict", "payment_id was already used for a different job; these fields differ: TODO")),
        ),
    ],
)
def test_a_job_that_is_refused_fails_like_any_task(
    kit: Kit, notes: Callable[[], list[str]], payment: Callable[[Kit], Signature], exception: Raised
) -> None:
    """An invalid job and a conflict raise, call the errbacks, and fail the chord they are in."""
    refused = payment(kit)
    refused.link_error(kit.note("sorry"))
    body = kit.note("body", link_error=kit.note("body-sorry"))
    result = chord([refused, kit.note("x")], body, app=kit.app).apply_async()
    assert raised_by(result.parent.results[0]) == exception
    eventually(lambda: notes() == ["body-sorry", "sorry", "x"])
    eventually(lambda: type(result.result).__name__ == "ChordError")


def test_every_task_that_waits_for_a_payment_is_told(
    payready: System, kit: Kit, notes: Callable[[], list[str]]
) -> None:
    """The same job sent twice is one payment with one outcome; both results have it, and both callbacks run."""
    first = kit.pay(link=kit.note("one")).apply_async()
    second = kit.pay(link=kit.note("two")).apply_async()
    eventually(lambda: waits(first) and waits(second))
    send_balance(payready, kit.account_id)
    assert first.get(timeout=15) == second.get(timeout=15)
    eventually(lambda: notes() == ["one", "two"])


def test_a_callback_that_waits_long_elsewhere_is_not_taken_for_lost(service: Celery, kit: Kit) -> None:
    """A message with a countdown is held by its own worker's keys; payready restores none but its own."""
    kit.note("later", countdown=3600).apply_async(task_id=f"held-{kit.account_id}")
    client = service.backend.client
    eventually(lambda: any(kit.account_id.encode() in message for message in client.hvals("unacked")))
    assert not any(kit.account_id.encode() in message for message in client.hvals("payready-unacked"))
