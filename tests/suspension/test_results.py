"""The result of a payment is a Celery result, and the task can be revoked like one."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery, chord
from celery.canvas import Signature

from tests.support.system import System, eventually
from tests.suspension.primitive_kit import Kit
from tests.suspension.primitive_runs import Received, new_account_id, send_balance

RESULT_EXPIRES_S = 86_400
Raised = tuple[str, tuple[Any, ...]]


@pytest.fixture
def kit(service: Celery, request: pytest.FixtureRequest) -> Kit:
    """Return payments of a new account, whose balance the test sends."""
    return Kit(service, "payments.initiate", "payments", new_account_id(), request.node.name, fails=False)


@pytest.fixture
def notes(kit: Kit, received: Received) -> Callable[[], list[str]]:
    """Return a function that returns the notes that this test's callbacks have recorded so far."""
    return lambda: sorted(note["mark"] for note in received[kit.tag])


@pytest.fixture
def key(service: Celery) -> Callable[[Any], bytes]:
    """Return a function that returns the Redis key of a result."""
    return lambda result: bytes(service.backend.get_key_for_task(result.id))


def is_waiting(result: Any) -> bool:
    return bool(result.state == "WAITING")


def raised_by(result: Any) -> Raised:
    """Return the name and the arguments of the exception that a result raises."""
    with pytest.raises(Exception) as raised:  # its class is made from its name alone
        result.get(timeout=15)
    return type(raised.value).__name__, raised.value.args


def test_waiting_result_has_account_and_deadline(payready: System, kit: Kit) -> None:
    """Its state is WAITING: not ready, neither failed nor successful."""
    result = kit.pay().apply_async()
    eventually(lambda: is_waiting(result))
    row = payready.payment(kit.payments[0])
    meta = result.info
    assert meta["account_id"] == kit.account_id
    assert set(meta) == {"account_id", "deadline"}
    assert datetime.fromisoformat(meta["deadline"]) == row["deadline"]
    assert (result.ready(), result.successful(), result.failed()) == (False, False, False)


def test_get_returns_the_outcome_after_the_balance(payready: System, kit: Kit) -> None:
    """`get` blocks until the webhook. The result is then stored until it is forgotten."""
    result = kit.pay().apply_async()
    eventually(lambda: is_waiting(result))
    send_balance(payready, kit.account_id)
    outcome = result.get(timeout=15)
    assert (outcome["payment_id"], outcome["state"]) == (kit.payments[0], "released")
    assert (result.ready(), result.successful(), result.failed()) == (True, True, False)
    result.forget()
    assert payready.service.AsyncResult(result.id).state == "PENDING"


def test_get_raises_reason_and_detail_after_the_deadline(kit: Kit) -> None:
    """The exception is `PaymentNotReady(reason, detail)`, also in a process without that class."""
    job = kit.job() | {"timeout_s": 1}
    result = kit.initiate(kwargs=job).apply_async()
    name, (reason, detail) = raised_by(result)
    assert (name, reason) == ("PaymentNotReady", "timeout")
    assert detail.startswith("no balance arrived within 1 s")
    assert (result.ready(), result.successful(), result.failed()) == (True, False, True)


def test_results_expire_as_configured(payready: System, service: Celery, kit: Kit, key: Callable[[Any], bytes]) -> None:
    """`result_expires` applies to WAITING, SUCCESS and FAILURE."""
    covered = kit.pay().apply_async()
    uncovered = kit.initiate(kwargs=kit.job("bad") | {"amount": "9999.00"}).apply_async()
    eventually(lambda: is_waiting(covered) and is_waiting(uncovered))
    client = service.backend.client
    assert RESULT_EXPIRES_S - 60 < client.ttl(key(covered)) <= RESULT_EXPIRES_S
    send_balance(payready, kit.account_id)
    covered.get(timeout=15)
    raised_by(uncovered)
    for result in (covered, uncovered):
        assert RESULT_EXPIRES_S - 60 < client.ttl(key(result)) <= RESULT_EXPIRES_S


def test_ignored_result_is_not_stored(
    payready: System, service: Celery, kit: Kit, notes: Callable[[], list[str]], key: Callable[[Any], bytes]
) -> None:
    """With `ignore_result` neither WAITING nor the outcome is stored. Callbacks are called."""
    result = kit.pay(ignore_result=True, link=kit.note("next")).apply_async()
    payready.payment(kit.payments[0])
    send_balance(payready, kit.account_id)
    eventually(lambda: notes() == ["next"])
    assert not service.backend.client.exists(key(result))


def test_expired_job_is_never_started(payready: System, kit: Kit) -> None:
    """Celery revokes it like any task, and no payment is created."""
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


@pytest.mark.parametrize("cancel", [_revoke, _terminate, _cancel])
def test_revoked_or_cancelled_payment_fails_as_cancelled(
    payready: System, kit: Kit, notes: Callable[[], list[str]], cancel: Callable[[Kit, Any], None]
) -> None:
    """Errbacks run, and a later balance releases nothing."""
    body = kit.note("body", link_error=kit.note("body-errback"))
    header = [kit.pay(link=kit.note("next"), link_error=kit.note("errback")), kit.note("x")]
    payment = chord(header, body, app=kit.app).apply_async().parent.results[0]
    eventually(lambda: is_waiting(payment) and "x" in notes())
    cancel(kit, payment)
    called = "payments.cancel was called, by the payments service or on the command line"
    detail = called if cancel is _cancel else "its Celery task was revoked"
    assert raised_by(payment) == ("PaymentNotReady", ("cancelled", detail))
    eventually(lambda: notes() == ["body-errback", "errback", "x"])
    other = kit.pay("other").apply_async()
    eventually(lambda: is_waiting(other))
    send_balance(payready, kit.account_id)
    other.get(timeout=15)
    assert payready.payment(kit.payments[0])["state"] == "failed"
    assert payready.service.AsyncResult(payment.id).state == "FAILURE"
    assert notes() == ["body-errback", "errback", "x"]


def _unknown_field(kit: Kit) -> Signature:
    return kit.initiate(kwargs=kit.job() | {"amuont": "1.00"})


def _no_mapping(kit: Kit) -> Signature:
    return kit.initiate(args=([1, 2],))


def _conflict(kit: Kit) -> Signature:
    first = kit.pay().apply_async()
    eventually(lambda: is_waiting(first))
    return kit.initiate(kwargs=kit.job() | {"amount": "0.02"})


@pytest.mark.parametrize(
    ("payment", "exception"),
    [
        (_unknown_field, ("InvalidJob", ('amuont: is not a field of a job (did you mean "amount"?)',))),
        (_no_mapping, ("InvalidJob", ("the positional argument must be a job, a mapping, not list",))),
        (
            _conflict,
            (
                "PaymentNotReady",
                ("conflict", "payment_id was already used for a different job; these fields differ: amount"),
            ),
        ),
    ],
)
def test_invalid_job_fails_like_any_task(
    kit: Kit, notes: Callable[[], list[str]], payment: Callable[[Kit], Signature], exception: Raised
) -> None:
    """An invalid job and a conflict raise, call the errbacks, and fail their chord."""
    invalid = payment(kit)
    invalid.link_error(kit.note("errback"))
    body = kit.note("body", link_error=kit.note("body-errback"))
    result = chord([invalid, kit.note("x")], body, app=kit.app).apply_async()
    assert raised_by(result.parent.results[0]) == exception
    eventually(lambda: notes() == ["body-errback", "errback", "x"])
    eventually(lambda: type(result.result).__name__ == "ChordError")


@pytest.mark.parametrize("options", [{}, {"expires": 3600}], ids=["batch", "default-strategy"])
@pytest.mark.parametrize("payment", [_unknown_field, _no_mapping, _conflict])
def test_result_of_a_refused_job_has_no_traceback(
    service: Celery, kit: Kit, key: Callable[[Any], bytes], payment: Callable[[Kit], Signature], options: dict[str, Any]
) -> None:
    """It has the type and the message of the error, and no path of our source."""
    refused = payment(kit).set(**options).apply_async()
    name, _ = raised_by(refused)
    stored = service.backend.client.get(key(refused))
    assert json.loads(stored)["traceback"] is None
    assert b".py" not in stored
    assert json.loads(stored)["result"]["exc_type"] == name


@pytest.mark.parametrize("task", ["payments.cancel", "payments.end_hold"])
@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((12,), {}, "payment_id: must be 1 to 128 printable ASCII characters without spaces"),
        (("pay 1",), {}, "payment_id: must be 1 to 128 printable ASCII characters without spaces"),
        ((["pay_1"],), {}, "payment_id: must be 1 to 128 printable ASCII characters without spaces"),
        ((), {}, "payment_id: is missing"),
        ((None,), {}, "payment_id: is missing"),
        (("pay_1", "pay_2"), {}, "payment_id: must be the only argument"),
        (("pay_1",), {"payment_id": "pay_1"}, "payment_id: must be the only argument"),
        ((), {"payment": "pay_1"}, "payment: is not an argument of this task, only payment_id is"),
    ],
)
def test_wrong_argument_fails_with_its_name(
    payready: System, kit: Kit, task: str, args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    """The caller gets the error, and the log of the worker has no traceback."""
    log = payready.processes.log_of("worker")
    logged = log.read_text()
    result = kit.app.send_task(task, args, kwargs, queue="payments")
    assert raised_by(result) == ("InvalidJob", (message,))
    assert "Traceback" not in log.read_text().removeprefix(logged)


@pytest.mark.parametrize("options", [{}, {"expires": 3600}], ids=["batch", "default-strategy"])
def test_superfluous_positional_argument_of_a_job_is_refused(payready: System, kit: Kit, options: Any) -> None:
    log = payready.processes.log_of("worker")
    logged = log.read_text()
    result = kit.app.send_task("payments.initiate", (kit.job(), kit.job()), queue="payments", **options)
    name, (message,) = raised_by(result)
    assert (name, message.partition(";")[0]) == ("InvalidJob", "more than one positional argument")
    assert "Traceback" not in log.read_text().removeprefix(logged)


@pytest.mark.parametrize("arguments", [{"args": ("{}",)}, {"kwargs": {"payment_id": "{}"}}])
def test_payment_id_of_cancel_may_be_positional_or_named(kit: Kit, arguments: dict[str, Any]) -> None:
    result = kit.pay().apply_async()
    eventually(lambda: is_waiting(result))
    filled = json.loads(json.dumps(arguments).replace("{}", kit.payments[0]))
    assert kit.app.send_task("payments.cancel", queue="payments", **filled).get(timeout=15) is True


def test_every_task_of_a_payment_gets_the_outcome(payready: System, kit: Kit, notes: Callable[[], list[str]]) -> None:
    """The same job sent twice is one payment. Both results have the outcome, and both callbacks run."""
    first = kit.pay(link=kit.note("one")).apply_async()
    second = kit.pay(link=kit.note("two")).apply_async()
    eventually(lambda: is_waiting(first) and is_waiting(second))
    send_balance(payready, kit.account_id)
    assert first.get(timeout=15) == second.get(timeout=15)
    eventually(lambda: notes() == ["one", "two"])


def test_delayed_callback_of_another_worker_is_not_restored(service: Celery, kit: Kit) -> None:
    """A message with a countdown is in its own worker's `unacked` keys. payready restores only its own."""
    kit.note("later", countdown=3600).apply_async(task_id=f"delayed-{kit.account_id}")
    client = service.backend.client
    eventually(lambda: any(kit.account_id.encode() in message for message in client.hvals("unacked")))
    assert not any(kit.account_id.encode() in message for message in client.hvals("payready-unacked"))
