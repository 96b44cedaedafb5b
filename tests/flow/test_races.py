"""Races: concurrent operations have exactly one winner. The tests use real threads and real databases."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from datetime import timedelta
from decimal import Decimal
from typing import Any, TypeVar

import pytest

from tests.support.in_process import Databases, InProcessSystem, TaskQueue, intake_request
from worker import flow
from worker.errors import CallFailed, CallNotSent, CallResultUnknown
from worker.flow import FollowUp, maintenance, resolution
from worker.ledger import refreshes
from worker.ledger.engine import Engine, Tx, transaction
from worker.rules.states import RefreshEvent

A = "acct_races"
ROUNDS = 12
T = TypeVar("T")


def at_once(*steps: Callable[[], T]) -> list[T]:
    """Run these steps concurrently and return their results."""
    start = threading.Barrier(len(steps))

    def run(step: Callable[[], T]) -> T:
        start.wait(10)
        return step()

    with ThreadPoolExecutor(len(steps)) as pool:
        futures: list[Future[T]] = [pool.submit(run, step) for step in steps]
    return [future.result() for future in futures]


def test_release_against_expiry_has_one_winner(payready: InProcessSystem) -> None:
    """A balance and the deadline compete: each payment is resolved and delivered by one of them."""
    wins = {"released": 0, "failed": 0}
    for number in range(ROUNDS):
        account = f"acct_race{number}"
        for name in "ab":
            payready.initiate(f"{name}{number}", account, timeout_s=1, amount="1.00")
        payready.run_tasks()
        balance_id = payready.balance(account, later=True)
        payready.drop_tasks()
        payready.clock.advance(1)
        done = at_once(
            lambda balance_id=balance_id: flow.apply_balance(payready.rt, balance_id),  # type: ignore[misc]
            lambda: flow.expire_poll_or_rejoin_due_payments(payready.rt).follow_up,
            lambda balance_id=balance_id: flow.apply_balance(payready.rt, balance_id),  # type: ignore[misc]
            lambda: flow.expire_poll_or_rejoin_due_payments(payready.rt).follow_up,
        )
        resolved = [due.outcome["payment_id"] for step in done for due in step.deliveries]
        for name in "ab":
            state = payready.payment(f"{name}{number}")["state"]
            wins[state] += 1
        assert sorted(resolved) == [f"a{number}", f"b{number}"], "a payment was resolved twice, or not at all"
    assert sum(wins.values()) == 2 * ROUNDS


def test_concurrent_applies_of_one_balance_resolve_each_payment_once(payready: InProcessSystem) -> None:
    """The fee is posted once and shared once."""
    for number in range(ROUNDS):
        account = f"acct_same{number}"
        for name in "abc":
            payready.initiate(f"{name}{number}", account, amount="1.00")
        payready.run_tasks()
        balance_id = payready.balance(account, later=True)
        payready.drop_tasks()
        done = at_once(*[lambda balance_id=balance_id: flow.apply_balance(payready.rt, balance_id)] * 3)
        resolved = [due.outcome["payment_id"] for step in done for due in step.deliveries]
        assert sorted(resolved) == [f"{name}{number}" for name in "abc"]
        assert payready.fees(account) == ["1 pending", "1 posted"]


def test_cancel_against_release_has_one_winner(payready: InProcessSystem) -> None:
    """A payment with the outcome `cancelled` was not released."""
    for number in range(ROUNDS):
        account = f"acct_cancel{number}"
        payready.initiate(f"p{number}", account)
        payready.run_tasks()
        balance_id = payready.balance(account, later=True)
        payready.drop_tasks()
        done = at_once(
            lambda balance_id=balance_id: flow.apply_balance(payready.rt, balance_id),  # type: ignore[misc]
            lambda number=number: flow.cancel_waiting(payready.rt, [f"p{number}"]),  # type: ignore[misc]
        )
        assert len([payment_id for step in done for payment_id in step.deliveries]) == 1
        assert payready.state(f"p{number}") == ("released" if done[0].deliveries else "cancelled")


def test_concurrent_balances_release_one_of_two_payments(payready: InProcessSystem) -> None:
    """Two payments of 80 and two balances of 100 of the same time: one payment is released."""
    for number in range(ROUNDS):
        account = f"acct_eighty{number}"
        payready.initiate(f"a{number}", account, amount="80.00")
        payready.initiate(f"b{number}", account, amount="80.00", max_balance_age_s=60)
        payready.run_tasks()
        first, second = payready.balance(account, later=True), payready.balance(account, later=True)
        payready.drop_tasks()
        at_once(
            lambda first=first: flow.apply_balance(payready.rt, first),  # type: ignore[misc]
            lambda second=second: flow.apply_balance(payready.rt, second),  # type: ignore[misc]
        )
        states = sorted(payready.state(f"{name}{number}") for name in "ab")
        assert states == ["insufficient_funds", "released"]


def test_concurrent_balance_deducts_the_release_of_another(payready: InProcessSystem) -> None:
    """The first balance is too old for the second payment, so each payment has its own balance."""
    for number in range(ROUNDS):
        account = f"acct_deduct{number}"
        payready.initiate(f"a{number}", account, amount="80.00")
        payready.drop_tasks()
        old = payready.balance(account, later=True)
        payready.clock.advance(10)
        payready.initiate(f"b{number}", account, amount="80.00", max_balance_age_s=1)
        young = payready.balance(account, later=True)
        payready.drop_tasks()
        at_once(
            lambda old=old: flow.apply_balance(payready.rt, old),  # type: ignore[misc]
            lambda young=young: flow.apply_balance(payready.rt, young),  # type: ignore[misc]
        )
        assert payready.state(f"a{number}") == "released"
        assert payready.state(f"b{number}") == "insufficient_funds"


def test_payment_that_joins_during_an_apply_is_released(payready: InProcessSystem) -> None:
    """Either transaction sees the other one, so no maintenance is needed."""
    for number in range(ROUNDS):
        account = f"acct_meet{number}"
        payready.initiate(f"a{number}", account)
        payready.run_tasks()
        balance_id = payready.balance(account, later=True)
        payready.drop_tasks()
        at_once(
            lambda balance_id=balance_id: payready.queue.add(flow.apply_balance(payready.rt, balance_id)),  # type: ignore[misc]
            lambda number=number, account=account: payready.initiate(f"b{number}", account),  # type: ignore[misc]
        )
        payready.run_tasks()
        assert payready.state(f"b{number}") == "released"


@pytest.mark.parametrize("same", [True, False], ids=["one refresh", "a refresh each"])
def test_concurrent_call_messages_make_one_call(payready: InProcessSystem, same: bool) -> None:  # noqa: FBT001
    """The same message twice, or two leading payments (Redis was flushed between them)."""
    for number in range(ROUNDS):
        account = f"acct_call{number}"
        first = payready.initiate(f"a{number}", account)
        payready.flush()
        second = payready.initiate(f"b{number}", account)
        payready.drop_tasks()
        assert first.refresh_id != second.refresh_id
        ids = [str(first.refresh_id), str(first.refresh_id if same else second.refresh_id)]
        at_once(
            *(
                lambda refresh_id=refresh_id, account=account: flow.claim_and_call(payready.rt, account, refresh_id)
                for refresh_id in ids * 2
            )
        )
        assert payready.provider.calls.count(account) == 1
        assert payready.fees(account) == ["1 pending", "1 posted"]


def test_concurrent_duplicate_jobs_are_one_payment(payready: InProcessSystem) -> None:
    """Workers process messages with one payment_id."""
    for number in range(ROUNDS):
        account = f"acct_twice{number}"
        at_once(
            *(
                lambda task_id=f"t{number}{name}", number=number, account=account: payready.initiate(
                    f"p{number}", account, task_id=task_id
                )
                for name in "abc"
            )
        )
        payready.run_tasks()
        assert payready.provider.calls.count(account) == 1
        payready.balance(account)
        payready.run_tasks()
        assert [len(payready.delivered[f"t{number}{name}"]) for name in "abc"] == [1, 1, 1]


def test_balance_concurrent_with_its_response_posts_the_fee_once(payready: InProcessSystem) -> None:
    """The balance is applied while the 202 is recorded."""
    for number in range(ROUNDS):
        account = f"acct_early{number}"
        applied = threading.Event()

        def answer(account: str = account, applied: threading.Event = applied) -> int:
            balance_id = payready.balance(account, later=True)
            payready.drop_tasks()

            def apply() -> None:
                flow.apply_balance(payready.rt, balance_id)
                applied.set()

            threading.Thread(target=apply).start()
            return 202

        payready.provider.script[account] = [answer]
        payready.initiate(f"p{number}", account)
        payready.run_tasks()
        assert applied.wait(10)
        assert payready.fees(account) == ["1 pending", "1 posted"]
        assert payready.state(f"p{number}") == "released"
        assert payready.refreshes(account) == ["answered"]


def test_call_result_is_not_recorded_during_an_apply(
    payready: InProcessSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the account lock. Otherwise the refresh would stay accepted and block the next call."""
    reading, recorded = threading.Event(), threading.Event()
    expecting = refreshes.find_answerable_or_requested

    def read_slowly(*words: Any) -> Any:
        found = expecting(*words)
        reading.set()
        recorded.wait(0.3)  # times out: the account lock blocks the recording
        return found

    monkeypatch.setattr(refreshes, "find_answerable_or_requested", read_slowly)
    applying = threading.Thread(target=lambda: flow.apply_balance(payready.rt, payready.queue.balances_to_apply[0]))

    def answer() -> int:
        payready.balance(A, later=True)
        applying.start()
        assert reading.wait(10)
        return 202

    payready.provider.script[A] = [answer]
    entrance = payready.initiate("p1", A)
    flow.claim_and_call(payready.rt, A, str(entrance.refresh_id))
    recorded.set()
    applying.join(10)
    assert payready.refreshes(A) == ["answered"]
    assert payready.fees(A) == ["1 pending", "1 posted"]


def test_concurrent_expiry_runs_share_the_payments(payready: InProcessSystem) -> None:
    """Each expired payment is resolved and delivered by one of them."""
    for number in range(60):
        payready.initiate(f"p{number}", f"acct_up{number}", timeout_s=1)
    payready.drop_tasks()
    payready.clock.advance(2)
    done = at_once(*[lambda: flow.expire_poll_or_rejoin_due_payments(payready.rt).follow_up] * 4)
    resolved = sorted(due.outcome["payment_id"] for step in done for due in step.deliveries)
    assert resolved == sorted(f"p{number}" for number in range(60))


def test_sweep_with_an_outdated_refresh_makes_no_third_call(payready: InProcessSystem) -> None:
    """It read the refresh before another sweep repeated the call."""
    payready.provider.script[A] = [CallResultUnknown("timeout")] * 5
    payready.initiate("p1", A, timeout_s=600)
    payready.run_tasks()
    payready.clock.advance(15)
    with transaction(payready.engine) as tx:
        [seen] = refreshes.find_due_in_flight_or_unneeded(tx, payready.clock.now, 10)
    payready.run_maintenance()
    assert payready.provider.calls == [A, A]
    payready.clock.advance(1)
    payready.queue.add(maintenance._abandon_retry_or_end_due_refresh(payready.rt, seen, payready.clock.now))
    payready.run_tasks()
    payready.pass_time(120)
    assert payready.provider.calls == [A, A]


def test_late_call_result_does_not_change_the_next_call(
    payready: InProcessSystem,
) -> None:
    """The first call hangs and is repeated; then it fails while the second one is in flight."""
    second_is_out, first_is_recorded = threading.Event(), threading.Event()

    def second() -> int:
        second_is_out.set()
        assert first_is_recorded.wait(10)
        return 202

    def first() -> CallFailed:
        payready.clock.advance(payready.rt.settings.max_call_and_record_duration.total_seconds())
        flow.sweep_refreshes_and_balances(payready.rt)
        payready.clock.advance(15)
        again = flow.sweep_refreshes_and_balances(payready.rt)
        call = again.calls[0]
        args = (payready.rt, call.account_id, call.refresh_id)
        threads.append(threading.Thread(target=flow.claim_and_call, args=args))
        threads[0].start()
        assert second_is_out.wait(10)
        return CallNotSent("no connection after a minute")

    threads: list[threading.Thread] = []
    payready.provider.script[A] = [first, second]
    payready.initiate("p1", A, timeout_s=600)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.run_maintenance()
    assert payready.refreshes(A) == ["calling"]
    first_is_recorded.set()
    threads[0].join(10)
    payready.pass_time(20)
    assert payready.provider.calls == [A, A], "a third call was made while the second was in flight"
    assert payready.refreshes(A) == ["accepted"]
    assert payready.fees(A) == ["1 pending", "2 pending", "1 void", "2 posted"]


def test_balance_applied_concurrently_answers_one_refresh(
    payready: InProcessSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second apply read the balance before the first one recorded its refresh."""
    payready.provider.script[A] = [CallResultUnknown("timeout")]
    payready.initiate("p1", A, timeout_s=10)
    payready.run_tasks()
    payready.pass_time(90)
    assert payready.refreshes(A) == ["unanswered"]
    payready.initiate("p2", A)
    payready.run_tasks()
    payready.clock.advance(2)
    balance_id = payready.balance(A, later=True)
    payready.drop_tasks()
    meanwhile: list[Callable[[], object]] = [lambda: None, lambda: flow.apply_balance(payready.rt, balance_id)]
    """Steps to run before the first transaction and before the second one."""

    def begin(engine: Engine) -> AbstractContextManager[Tx]:
        if meanwhile:
            meanwhile.pop(0)()
        return transaction(engine)

    monkeypatch.setattr(resolution, "transaction", begin)
    flow.apply_balance(payready.rt, balance_id)
    assert payready.state("p2") == "released"
    assert payready.refreshes(A) == ["unanswered", "answered"]
    assert payready.fees(A) == ["1 pending", "2 pending", "2 posted"], "a balance posted two calls"


def test_sweep_does_not_wait_for_a_refresh_being_claimed(payready: InProcessSystem, databases: Databases) -> None:
    """A batch claims refreshes in another order, so a wait could deadlock."""
    if databases.is_sqlite:
        pytest.skip("SQLite has one writer at a time")
    now = payready.clock.now
    first, second = (refreshes.new_refresh(f"a{n}", f"r{n}", now) for n in "12")
    with transaction(payready.engine) as tx:
        refreshes.insert_refreshes(tx, [first, second])

    def sweep() -> None:
        with transaction(payready.engine) as tx:
            refreshes.reschedule_requested_skip_locked(tx, [first, second], now + timedelta(seconds=15))

    with ThreadPoolExecutor(1) as pool:
        with transaction(payready.engine) as claiming:
            assert refreshes.transition(claiming, second, RefreshEvent.CLAIM, now)
            swept = pool.submit(sweep)
            wait([swept], 0.5)
            assert refreshes.transition(claiming, first, RefreshEvent.CLAIM, now)
        swept.result()
    assert payready.refreshes("a1") == payready.refreshes("a2") == ["calling"]


class ConcurrentWorkers:
    """Workers that share a queue, and a provider that sends a balance after each call."""

    def __init__(self, payready: InProcessSystem) -> None:
        self.payready = payready
        self.lock = threading.Lock()

    def add(self, follow_up: FollowUp) -> None:
        """Enqueue follow-ups."""
        with self.lock:
            self.payready.queue.add(follow_up)

    def fetch(self) -> TaskQueue:
        """Fetch all enqueued follow-ups."""
        with self.lock:
            follow_up, self.payready.queue = self.payready.queue, TaskQueue()
            return follow_up

    def submit(self, jobs: list[tuple[str, str]]) -> None:
        """Initiate jobs."""
        for payment_id, account_id in jobs:
            job = {"payment_id": payment_id, "account_id": account_id, "amount": "10.00"}
            arrived = intake_request(job, {"id": f"task_{payment_id}"})
            self.add(flow.accept_job(self.payready.rt, arrived, lambda _: None).follow_up)

    def work(self) -> None:
        """Process follow-ups."""
        for _ in range(60):
            follow_up = self.fetch()
            for call in follow_up.calls:
                self.add(flow.claim_and_call(self.payready.rt, call.account_id, call.refresh_id))
                self.send(call.account_id)
            for balance_id in follow_up.balances_to_apply:
                self.add(flow.apply_balance(self.payready.rt, balance_id))

    def send(self, account_id: str) -> None:
        """Ingest a balance of 100."""
        with self.lock:
            self.payready.clock.now += timedelta(microseconds=1)
            self.payready.balance(account_id, "100.00")


def test_concurrent_payments_on_few_accounts_keep_funds_and_fees_exact(payready: InProcessSystem) -> None:
    """Eight threads process jobs, calls and balances."""
    accounts = [f"acct_crowd{number}" for number in range(4)]
    jobs = [(f"p{number}", accounts[number % 4]) for number in range(80)]
    workers = ConcurrentWorkers(payready)
    at_once(*(lambda part=part: workers.submit(jobs[part::4]) for part in range(4)), *[workers.work] * 4)
    payready.run_tasks()
    for account_id in accounts:
        payready.balance(account_id, "0")
    payready.run_tasks()
    payready.pass_time(130)
    rows = payready.rows("SELECT account_id, state, amount FROM payment")
    assert len(rows) == 80
    assert {row["state"] for row in rows} <= {"released", "failed"}
    for account_id in accounts:
        of_account = [row for row in rows if row["account_id"] == account_id and row["state"] == "released"]
        released = sum(Decimal(str(row["amount"])) for row in of_account)
        assert released <= 100, "more was released than the balance of 100 covers"
        entries, calls = payready.fees(account_id), payready.provider.calls.count(account_id)
        assert sum("pending" in entry for entry in entries) == calls
        assert sum("posted" in entry for entry in entries) == calls
