"""Batches: each item of a batch is processed as if it were alone."""

from collections.abc import Mapping
from datetime import timedelta
from decimal import Decimal
from threading import Thread
from typing import Any
from unittest.mock import Mock

import pytest
from redis import RedisError
from sqlalchemy import text

from tests.support.concurrency import ROUNDS, run_concurrently
from tests.support.databases import Databases
from tests.support.in_process import InProcessSystem, MakeSystem, intake_request
from tests.support.simulator import eventually
from worker import flow, metrics
from worker.correlation.redis_client import RedisCommand
from worker.errors import InvalidJob, PaymentNotReady
from worker.flow import IntakeRequest, IntakeResult, OnWaiting, RefusedJob, ingest
from worker.ledger import balances, payments
from worker.ledger.engine import transaction
from worker.ledger.locks import lock_accounts, try_lock_accounts
from worker.quiltt.messages import Balance, BalanceWithEventId


def accept_batch(payready: InProcessSystem, *jobs: dict[str, Any]) -> None:
    """Accept jobs in one batch, and enqueue their follow-ups."""
    requests = [intake_request(job, {"id": f"task_{job['payment_id']}"}) for job in jobs]
    for accepted in flow.accept_jobs_unless_account_locked(payready.rt, requests, lambda _: []):
        assert isinstance(accepted, IntakeResult)
        payready.queue.add(accepted.follow_up)


Job = tuple[str, str, str]
"""Payment, account and task of a job."""


@pytest.mark.parametrize(
    ("jobs", "accepted", "error"),
    [
        ([("p1", "acct_1", "t1"), ("p2", "acct_2", "t1"), ("p3", "acct_3", "t3")], ["p1", "p3"], "InvalidJob"),
        ([("p1", "acct_1", "t0"), ("p2", "acct_2", "t2"), ("p3", "acct_3", "t3")], ["p2", "p3"], "InvalidJob"),
        ([("p0", "acct_9", "t1"), ("p2", "acct_2", "t2"), ("p3", "acct_3", "t3")], ["p2", "p3"], "PaymentNotReady"),
        # The first of two jobs for a payment is refused, so the second one is compared with nothing.
        ([("p1", "acct_1", "t0"), ("p1", "acct_2", "t2"), ("p3", "acct_3", "t3")], ["p1", "p3"], "InvalidJob"),
        # A refused job registers no task, so its task id is free for the next job.
        ([("p0", "acct_9", "t1"), ("p2", "acct_2", "t1"), ("p3", "acct_3", "t3")], ["p2", "p3"], "PaymentNotReady"),
    ],
)
def test_refused_job_leaves_the_rest_of_its_batch_accepted(
    payready: InProcessSystem, jobs: list[Job], accepted: list[str], error: str
) -> None:
    """Each job of a batch gets its own result. `p0` and its task `t0` are known from before."""
    payready.initiate("p0", "acct_0", task_id="t0")
    requests = [
        intake_request({"payment_id": payment_id, "account_id": account_id}, {"id": task_id})
        for payment_id, account_id, task_id in jobs
    ]
    waiting = list[str]()
    results = flow.accept_jobs_unless_account_locked(payready.rt, requests, collector(waiting))
    assert [type(result.error).__name__ for result in results if isinstance(result, RefusedJob)] == [error]
    taken = [
        (request.job.payment_id, request.task_id)
        for request, result in zip(requests, results, strict=True)
        if isinstance(result, IntakeResult)
    ]
    assert [payment_id for payment_id, _ in taken] == accepted
    assert waiting == [task_id for _, task_id in taken]
    stored = payready.rows("SELECT payment_id, task_id FROM outcome_delivery WHERE task_id != 't0' ORDER BY payment_id")
    assert [(row["payment_id"], row["task_id"]) for row in stored] == taken


def collector(task_ids: list[str]) -> OnWaiting:
    """Return a function that appends the ids of the waiting tasks."""

    def collect(waiting: Mapping[str, object]) -> list[RedisCommand]:
        task_ids.extend(waiting)
        return []

    return collect


@pytest.mark.parametrize(
    ("other", "error"),
    [
        ({"payment_id": "p1", "account_id": "acct_2", "task_id": "t2"}, PaymentNotReady),
        ({"payment_id": "p2", "account_id": "acct_2", "task_id": "t1"}, InvalidJob),
    ],
    ids=["one payment id, two accounts", "one task id, two payments"],
)
def test_of_concurrent_jobs_with_one_id_one_is_refused(
    payready: InProcessSystem, databases: Databases, other: dict[str, str], error: type[Exception]
) -> None:
    """It is decided after the first job is committed, so it stores no state `WAITING`, which might hide an outcome."""
    if databases.is_sqlite:
        pytest.skip("SQLite has one writer at a time")
    refused_waiting = list[str]()
    refused = intake_request(
        {"payment_id": other["payment_id"], "account_id": other["account_id"]}, {"id": other["task_id"]}
    )

    def accept_refused() -> list[Any]:
        return flow.accept_jobs_unless_account_locked(payready.rt, [refused], collector(refused_waiting))

    while_first_is_accepted = list[Any]()
    first = intake_request({"payment_id": "p1", "account_id": "acct_1"}, {"id": "t1"})

    def accept_other(_: object) -> list[RedisCommand]:
        while_first_is_accepted.extend(accept_refused())
        return []

    flow.accept_job(payready.rt, first, accept_other)
    assert while_first_is_accepted == [None], "the job was not left for later"
    [afterwards] = accept_refused()
    assert isinstance(afterwards, RefusedJob)
    assert isinstance(afterwards.error, error)
    assert refused_waiting == []
    assert payready.account_hash("acct_2").requested is None
    stored = payready.rows("SELECT payment_id, task_id FROM outcome_delivery")
    assert stored == [{"payment_id": "p1", "task_id": "t1"}]


def test_job_waits_for_another_one_with_its_payment_id(payready: InProcessSystem, databases: Databases) -> None:
    """A job that comes alone waits, on another account too. Then it is a conflict."""
    if databases.is_sqlite:
        pytest.skip("SQLite has one writer at a time")
    errors = list[Exception]()

    def accept_second() -> None:
        try:
            payready.initiate("p1", "acct_2", task_id="t2")
        except PaymentNotReady as error:
            errors.append(error)

    second = Thread(target=accept_second)

    def start_second(_: object) -> list[RedisCommand]:
        second.start()
        second.join(0.3)
        assert second.is_alive()
        return []

    flow.accept_job(
        payready.rt, intake_request({"payment_id": "p1", "account_id": "acct_1"}, {"id": "t1"}), start_second
    )
    second.join()
    detail = "payment_id was already used for a different job; these fields differ: account_id"
    assert [error.args for error in errors] == [("conflict", detail)]


def test_concurrent_jobs_that_share_ids_in_opposite_order_do_not_deadlock(payready: InProcessSystem) -> None:
    """Each thread's jobs use the accounts, payments and tasks of the others. All get a result."""
    for number in range(ROUNDS):
        jobs = [
            intake_request({"payment_id": f"p{number}_{p}", "account_id": f"acct_{a}"}, {"id": f"t{number}_{t}"})
            for p, a, t in ("123", "231", "312", "132", "213", "321")
        ]

        def accept(request: IntakeRequest) -> str:
            try:
                flow.accept_job(payready.rt, request, lambda _: [])
            except (InvalidJob, PaymentNotReady):
                return "refused"
            return "accepted"

        results = run_concurrently(*(lambda job=job: accept(job) for job in jobs))
        stored = payready.rows("SELECT payment_id FROM outcome_delivery WHERE task_id LIKE :of", of=f"t{number}_%")
        assert results.count("accepted") == len(stored) == len({row["payment_id"] for row in stored}) > 0


def test_callbacks_without_queue_are_counted_after_the_commit(
    payready: InProcessSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job whose transaction fails is processed again. It is counted once."""
    callback = {"task": "shop.paid", "args": [], "kwargs": {}, "options": {}}
    request = intake_request({"payment_id": "p1", "account_id": "acct_1"}, {"id": "t1", "callbacks": [callback]})
    count = metrics.JOBS_WITHOUT_CALLBACK_QUEUE._value.get
    before = count()
    with monkeypatch.context() as patch:
        patch.setattr(payments, "insert_payments", Mock(side_effect=ConnectionError))
        with pytest.raises(ConnectionError):
            flow.accept_job(payready.rt, request, lambda _: [])
    assert count() == before
    flow.accept_job(payready.rt, request, lambda _: [])
    assert count() == before + 1


def test_funds_cover_the_first_job_of_a_batch(payready: InProcessSystem) -> None:
    """The funds cover one payment. The order of the jobs decides, not the order of the ids."""
    job = {"account_id": "acct_1", "amount": "80.00"}
    accept_batch(payready, {"payment_id": "pay_b", **job}, {"payment_id": "pay_a", **job})
    payready.run_tasks()
    payready.balance("acct_1", "100.00")
    assert [payready.state_or_reason(name) for name in ("pay_b", "pay_a")] == ["released", "insufficient_funds"]


def test_outcome_is_delivered_once_when_two_refreshes_of_an_account_are_delayed(make_system: MakeSystem) -> None:
    """The circuit breaker is open for longer than the payment waits. The second refresh is one after a Redis flush."""
    with make_system(circuit_breaker_failures=1) as payready:
        payready.rt.admission.apply_result_to_breaker_and_limiter("failed", payready.clock.now, payready.clock.now)
        accept_batch(payready, {"payment_id": "pay_1", "account_id": "acct_1", "timeout_s": 2})
        calls = [flow.RefreshCall(account_id="acct_1", refresh_id=refresh_id) for refresh_id in ("ref_1", "ref_2")]
        claims = flow.claim_delay_or_reject_calls(payready.rt, calls)
        assert [due.task_id for due in claims.follow_up.deliveries] == ["task_pay_1"]


def test_claim_that_is_too_old_makes_no_call(payready: InProcessSystem) -> None:
    """Maintenance may have enqueued the call repetition by then. The fee of this claim is void."""
    payready.initiate("pay_1", "acct_1")
    calls = payready.queue.calls
    payready.drop_tasks()
    [claim] = flow.claim_delay_or_reject_calls(payready.rt, calls).claims
    payready.clock.now += flow.MAX_CLAIM_AGE + timedelta(seconds=1)
    flow.report_and_record_results(payready.rt, [flow.make_call_unless_claim_is_old(payready.rt, claim)])
    assert payready.provider.calls == []
    assert payready.fees("acct_1") == ["1 pending", "1 void"]


def test_balance_that_another_transaction_stores_is_applied_once(
    payready: InProcessSystem, databases: Databases
) -> None:
    """Its duplicate waits for the other transaction. The ledger must show the balance as applied."""
    if databases.is_sqlite:
        pytest.skip("SQLite has one writer at a time")
    payready.initiate("pay_1", "acct_1")
    payready.run_tasks()
    now = payready.clock.now
    balance = Balance.model_validate(
        {
            "id": "bal_1",
            "accountId": "acct_1",
            "at": now.isoformat(),
            "source": "REFRESH",
            "available": Decimal(1),
            "current": None,
            "limit": None,
        }
    )
    receiving = Thread(
        target=lambda: payready.queue.add(
            flow.ingest_events_and_resolve_payments(
                payready.rt, [BalanceWithEventId(event_id="evt_1", balance=balance)]
            )
        )
    )
    with transaction(payready.engine) as tx:
        balances.insert_balances(tx, [balances.new_unapplied_record("evt_1", balance, now, believe_arrival=False)])
        tx.execute(text("SELECT 1"))  # sends the insert
        receiving.start()
        receiving.join(1)
        assert receiving.is_alive()
    receiving.join()
    payready.run_tasks()
    [stored] = payready.rows("SELECT due_at, refresh_id FROM balance")
    assert stored["due_at"] is None
    assert stored["refresh_id"] is not None
    assert payready.state_or_reason("pay_1") == "released"


def refresh_balance(payready: InProcessSystem, account_id: str, balance_id: str) -> BalanceWithEventId:
    """Return a REFRESH balance of now with the id of its event."""
    at = payready.clock.now.isoformat()
    amounts = {"available": Decimal(100), "current": None, "limit": None}
    record = {"id": balance_id, "accountId": account_id, "at": at, "source": "REFRESH", **amounts}
    return BalanceWithEventId(event_id=f"evt_{balance_id}", balance=Balance.model_validate(record))


def test_error_at_the_commit_loses_no_balance(payready: InProcessSystem, databases: Databases) -> None:
    """A deferred constraint fails the COMMIT of the payment's release, which arrives with all writes."""
    if databases.is_sqlite:
        pytest.skip("SQLite has no deferred triggers")
    payready.initiate("pay_1", "acct_1")
    payready.run_tasks()
    with payready.engine.begin() as connection:
        connection.exec_driver_sql(_FAIL_AT_COMMIT)
    follow_up = flow.ingest_events_and_resolve_payments(payready.rt, [refresh_balance(payready, "acct_1", "bal_1")])
    assert follow_up.balances_to_apply == ["bal_1"]
    assert follow_up.deliveries == []
    assert payready.payment("pay_1")["state"] == "waiting"
    with payready.engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER fail_at_commit ON payment")
    payready.queue.add(follow_up)
    payready.run_tasks()
    assert payready.state_or_reason("pay_1") == "released"


_FAIL_AT_COMMIT = """
    CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'failed at the COMMIT'; END $$;
    CREATE CONSTRAINT TRIGGER fail_at_commit AFTER UPDATE ON payment
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail();
"""


def test_concurrent_copies_of_a_delivery_are_stored_without_a_deadlock(
    payready: InProcessSystem, databases: Databases, caplog: pytest.LogCaptureFixture
) -> None:
    """Two processes lock one of its accounts each, and each stores the balance that the other one applies."""
    if databases.is_sqlite:
        pytest.skip("SQLite has one writer at a time")
    for name in "ab":
        payready.initiate(f"pay_{name}", f"acct_{name}")
    payready.run_tasks()
    events = [refresh_balance(payready, f"acct_{name}", f"bal_{name}") for name in "ab"]

    def ingest() -> None:
        payready.queue.add(flow.ingest_events_and_resolve_payments(payready.rt, events))

    with transaction(payready.engine) as tx:
        payments.lock_waiting(tx, ["pay_a"])
        tx.execute(text("SELECT 1"))  # sends the lock
        first = Thread(target=ingest)
        with transaction(payready.engine) as other:
            lock_accounts(other, ["acct_b"])
            other.execute(text("SELECT 1"))  # sends the lock
            first.start()
            first.join(0.3)
        assert first.is_alive()
        ingest()
        assert [row["due_at"] is None for row in payready.rows("SELECT due_at FROM balance ORDER BY balance_id")] == [
            False,
            True,
        ]
    first.join()
    assert [row["due_at"] for row in payready.rows("SELECT due_at FROM balance")] == [None, None]
    payready.run_tasks()
    assert [payready.state_or_reason(f"pay_{name}") for name in "ab"] == ["released", "released"]
    assert [row["due_at"] for row in payready.rows("SELECT due_at FROM balance")] == [None, None]
    assert "balance.apply_postponed" not in caplog.text


def test_balance_sent_for_two_accounts_is_applied_to_one(payready: InProcessSystem) -> None:
    """It is stored once, and outcomes must name a balance of the ledger."""
    for name in "ab":
        payready.initiate(f"pay_{name}", f"acct_{name}")
    payready.run_tasks()
    events = [refresh_balance(payready, f"acct_{name}", "bal_1") for name in "ab"]
    payready.queue.add(flow.ingest_events_and_resolve_payments(payready.rt, events))
    payready.run_tasks()
    [stored] = payready.rows("SELECT account_id FROM balance")
    released = payready.rows("SELECT account_id FROM payment WHERE state = 'released'")
    assert released == [stored]


def test_repeated_jobs_are_locked_in_one_order(payready: InProcessSystem, databases: Databases) -> None:
    """The transaction that fails payments of a lost connection uses the same order: otherwise the two deadlock."""
    if databases.is_sqlite:
        pytest.skip("SQLite has one writer at a time")
    jobs = [{"payment_id": f"pay_{n}", "account_id": f"acct_{n}"} for n in "21"]
    accept_batch(payready, *jobs)
    repetition = Thread(target=accept_batch, args=(payready, *jobs))
    with transaction(payready.engine) as tx:
        payments.lock_waiting(tx, ["pay_1"])
        repetition.start()
        repetition.join(0.5)
        assert repetition.is_alive()
        payments.lock_waiting(tx, ["pay_2"])
    repetition.join()
    payready.run_tasks()
    assert payready.provider.calls == ["acct_2", "acct_1"]


def test_result_of_a_locked_account_blocks_no_other_result(payready: InProcessSystem, databases: Databases) -> None:
    """It is recorded when the account is unlocked."""
    if databases.is_sqlite:
        pytest.skip("SQLite has one writer at a time")
    accept_batch(payready, *({"payment_id": f"pay_{n}", "account_id": f"acct_{n}"} for n in range(2)))
    claims = flow.claim_delay_or_reject_calls(payready.rt, payready.queue.calls)
    results = [flow.make_call_unless_claim_is_old(payready.rt, claim) for claim in claims.claims]
    recording = Thread(target=flow.report_and_record_results, args=(payready.rt, results))
    with transaction(payready.engine) as tx:
        assert try_lock_accounts(tx, ["acct_0"]).result()
        recording.start()
        eventually(lambda: payready.fees("acct_1") == ["1 pending", "1 posted"])
        assert payready.fees("acct_0") == ["1 pending"]
    recording.join()
    assert payready.fees("acct_0") == ["1 pending", "1 posted"]
    assert payready.refreshes("acct_0") == ["accepted"]


@pytest.mark.parametrize(
    ("error", "event", "has_traceback"),
    [(RedisError("no answer"), "balance.apply_postponed", False), (KeyError("a bug"), "balance.apply_failed", True)],
)
def test_ingest_stores_balances_that_it_cannot_apply(
    payready: InProcessSystem,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    event: str,
    *,
    has_traceback: bool,
) -> None:
    """An unexpected error is logged with its traceback, a server that does not respond with one line."""
    payready.initiate("pay_1", "acct_1")
    payready.run_tasks()
    with monkeypatch.context() as patched:
        patched.setattr(ingest, "add_to_correlation_and_resolve_payments", Mock(side_effect=error))
        follow_up = flow.ingest_events_and_resolve_payments(payready.rt, [refresh_balance(payready, "acct_1", "bal_1")])
    assert follow_up.balances_to_apply == ["bal_1"]
    [record] = [record for record in caplog.records if "balance.apply" in str(record.msg)]
    assert event in str(record.msg)
    assert bool(isinstance(record.msg, dict) and record.msg.get("exc_info")) == has_traceback
    payready.queue.add(follow_up)
    payready.run_tasks()
    assert payready.state_or_reason("pay_1") == "released"
