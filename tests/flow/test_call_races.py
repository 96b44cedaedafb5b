"""Races of calls: concurrent messages, results and sweeps make one call and post its fee once."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import pytest

from tests.support.concurrency import ROUNDS, run_concurrently
from tests.support.databases import Databases
from tests.support.in_process import InProcessSystem
from worker import flow
from worker.errors import CallFailed, CallNotSent, CallResultUnknown
from worker.flow import maintenance, resolution
from worker.ledger import refreshes
from worker.ledger.engine import Engine, Tx, transaction
from worker.rules.states import RefreshEvent

A = "acct_races"


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
        run_concurrently(
            *(
                lambda refresh_id=refresh_id, account=account: flow.claim_and_call(payready.rt, account, refresh_id)
                for refresh_id in ids * 2
            )
        )
        assert payready.provider.calls.count(account) == 1
        assert payready.fees(account) == ["1 pending", "1 posted"]


def test_balance_concurrent_with_its_response_posts_the_fee_once(payready: InProcessSystem) -> None:
    """The balance is applied while the 202 is recorded."""
    for number in range(ROUNDS):
        account = f"acct_early{number}"
        applied = threading.Event()

        def respond(account: str = account, applied: threading.Event = applied) -> int:
            balance_id = payready.balance(account, stored_only=True)
            payready.drop_tasks()

            def apply() -> None:
                flow.apply_balance(payready.rt, balance_id)
                applied.set()

            threading.Thread(target=apply).start()
            return 202

        payready.provider.script[account] = [respond]
        payready.initiate(f"p{number}", account)
        payready.run_tasks()
        assert applied.wait(10)
        assert payready.fees(account) == ["1 pending", "1 posted"]
        assert payready.state_or_reason(f"p{number}") == "released"
        assert payready.refreshes(account) == ["answered"]


def test_call_result_is_not_recorded_during_an_apply(
    payready: InProcessSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the account lock. Otherwise the refresh would stay accepted and block the next call."""
    reading, recorded = threading.Event(), threading.Event()
    original = refreshes.find_answerable_or_requested

    def read_slowly(*arguments: Any) -> Any:
        found = original(*arguments)
        found.result()
        reading.set()
        recorded.wait(0.3)  # times out: the account lock blocks the recording
        return found

    monkeypatch.setattr(refreshes, "find_answerable_or_requested", read_slowly)
    applying = threading.Thread(target=lambda: flow.apply_balance(payready.rt, payready.queue.balances_to_apply[0]))

    def respond() -> int:
        payready.balance(A, stored_only=True)
        applying.start()
        assert reading.wait(10)
        return 202

    payready.provider.script[A] = [respond]
    accepted = payready.initiate("p1", A)
    flow.claim_and_call(payready.rt, A, str(accepted.refresh_id))
    recorded.set()
    applying.join(10)
    assert payready.refreshes(A) == ["answered"]
    assert payready.fees(A) == ["1 pending", "1 posted"]


def test_sweep_with_an_outdated_refresh_makes_no_third_call(payready: InProcessSystem) -> None:
    """It read the refresh before another sweep repeated the call."""
    payready.provider.script[A] = [CallResultUnknown("timeout")] * 5
    payready.initiate("p1", A, timeout_s=600)
    payready.run_tasks()
    payready.clock.advance(15)
    with transaction(payready.engine) as tx:
        [outdated] = refreshes.find_due_in_flight_or_unneeded(tx, payready.clock.now, 10).result()
    payready.run_maintenance()
    assert payready.provider.calls == [A, A]
    payready.clock.advance(1)
    payready.queue.add(maintenance._abandon_retry_or_end_due_refresh(payready.rt, outdated, payready.clock.now))
    payready.run_tasks()
    payready.pass_time(120)
    assert payready.provider.calls == [A, A]


def test_late_call_result_does_not_change_the_next_call(
    payready: InProcessSystem,
) -> None:
    """The first call hangs and is repeated; then it fails while the second one is in flight."""
    second_is_in_flight, first_is_recorded = threading.Event(), threading.Event()

    def second() -> int:
        second_is_in_flight.set()
        assert first_is_recorded.wait(10)
        return 202

    def first() -> CallFailed:
        payready.clock.advance(payready.rt.settings.max_call_and_record_duration.total_seconds())
        flow.sweep_refreshes_and_balances(payready.rt)
        payready.clock.advance(15)
        follow_up = flow.sweep_refreshes_and_balances(payready.rt)
        call = follow_up.calls[0]
        args = (payready.rt, call.account_id, call.refresh_id)
        threads.append(threading.Thread(target=flow.claim_and_call, args=args))
        threads[0].start()
        assert second_is_in_flight.wait(10)
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
    balance_id = payready.balance(A, stored_only=True)
    payready.drop_tasks()
    steps_before: list[Callable[[], object]] = [lambda: None, lambda: flow.apply_balance(payready.rt, balance_id)]
    """Steps to run before the first transaction and before the second one."""

    def run_step_then_begin(engine: Engine) -> AbstractContextManager[Tx]:
        if steps_before:
            steps_before.pop(0)()
        return transaction(engine)

    monkeypatch.setattr(resolution, "transaction", run_step_then_begin)
    flow.apply_balance(payready.rt, balance_id)
    assert payready.state_or_reason("p2") == "released"
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
            assert refreshes.transition(claiming, second, RefreshEvent.CLAIM, now).result()
            swept = pool.submit(sweep)
            wait([swept], 0.5)
            assert refreshes.transition(claiming, first, RefreshEvent.CLAIM, now).result()
        swept.result()
    assert payready.refreshes("a1") == payready.refreshes("a2") == ["calling"]
