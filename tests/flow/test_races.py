"""Races of resolution: concurrent operations have one winner. The tests use real threads and real databases."""

import threading
from datetime import timedelta
from decimal import Decimal

from tests.support.concurrency import ROUNDS, run_concurrently
from tests.support.in_process import InProcessSystem, TaskQueue, intake_request
from worker import flow
from worker.flow import FollowUp


def test_release_against_expiry_has_one_winner(payready: InProcessSystem) -> None:
    """A balance and the deadline compete: each payment is resolved and delivered by one of them."""
    wins = {"released": 0, "failed": 0}
    for number in range(ROUNDS):
        account = f"acct_race{number}"
        for name in "ab":
            payready.initiate(f"{name}{number}", account, timeout_s=1, amount="1.00")
        payready.run_tasks()
        balance_id = payready.balance(account, stored_only=True)
        payready.drop_tasks()
        payready.clock.advance(1)
        done = run_concurrently(
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
        balance_id = payready.balance(account, stored_only=True)
        payready.drop_tasks()
        done = run_concurrently(*[lambda balance_id=balance_id: flow.apply_balance(payready.rt, balance_id)] * 3)
        resolved = [due.outcome["payment_id"] for step in done for due in step.deliveries]
        assert sorted(resolved) == [f"{name}{number}" for name in "abc"]
        assert payready.fees(account) == ["1 pending", "1 posted"]


def test_cancel_against_release_has_one_winner(payready: InProcessSystem) -> None:
    """A payment with the outcome `cancelled` was not released."""
    for number in range(ROUNDS):
        account = f"acct_cancel{number}"
        payready.initiate(f"p{number}", account)
        payready.run_tasks()
        balance_id = payready.balance(account, stored_only=True)
        payready.drop_tasks()
        done = run_concurrently(
            lambda balance_id=balance_id: flow.apply_balance(payready.rt, balance_id),  # type: ignore[misc]
            lambda number=number: flow.fail_waiting_as_cancelled_with_fee_share(payready.rt, [f"p{number}"]),  # type: ignore[misc]
        )
        assert len([payment_id for step in done for payment_id in step.deliveries]) == 1
        assert payready.state_or_reason(f"p{number}") == ("released" if done[0].deliveries else "cancelled")


def test_concurrent_balances_release_one_of_two_payments(payready: InProcessSystem) -> None:
    """Two payments of 80 and two balances of 100 of the same time: one payment is released."""
    for number in range(ROUNDS):
        account = f"acct_eighty{number}"
        payready.initiate(f"a{number}", account, amount="80.00")
        payready.initiate(f"b{number}", account, amount="80.00", max_balance_age_s=60)
        payready.run_tasks()
        first, second = payready.balance(account, stored_only=True), payready.balance(account, stored_only=True)
        payready.drop_tasks()
        run_concurrently(
            lambda first=first: flow.apply_balance(payready.rt, first),  # type: ignore[misc]
            lambda second=second: flow.apply_balance(payready.rt, second),  # type: ignore[misc]
        )
        states = sorted(payready.state_or_reason(f"{name}{number}") for name in "ab")
        assert states == ["insufficient_funds", "released"]


def test_concurrent_balance_deducts_the_release_of_another(payready: InProcessSystem) -> None:
    """The first balance is too old for the second payment, so each payment has its own balance."""
    for number in range(ROUNDS):
        account = f"acct_deduct{number}"
        payready.initiate(f"a{number}", account, amount="80.00")
        payready.drop_tasks()
        old = payready.balance(account, stored_only=True)
        payready.clock.advance(10)
        payready.initiate(f"b{number}", account, amount="80.00", max_balance_age_s=1)
        young = payready.balance(account, stored_only=True)
        payready.drop_tasks()
        run_concurrently(
            lambda old=old: flow.apply_balance(payready.rt, old),  # type: ignore[misc]
            lambda young=young: flow.apply_balance(payready.rt, young),  # type: ignore[misc]
        )
        assert payready.state_or_reason(f"a{number}") == "released"
        assert payready.state_or_reason(f"b{number}") == "insufficient_funds"


def test_payment_that_joins_during_an_apply_is_released(payready: InProcessSystem) -> None:
    """Either transaction sees the other one, so no maintenance is needed."""
    for number in range(ROUNDS):
        account = f"acct_meet{number}"
        payready.initiate(f"a{number}", account)
        payready.run_tasks()
        balance_id = payready.balance(account, stored_only=True)
        payready.drop_tasks()
        run_concurrently(
            lambda balance_id=balance_id: payready.queue.add(flow.apply_balance(payready.rt, balance_id)),  # type: ignore[misc]
            lambda number=number, account=account: payready.initiate(f"b{number}", account),  # type: ignore[misc]
        )
        payready.run_tasks()
        assert payready.state_or_reason(f"b{number}") == "released"


def test_concurrent_duplicate_jobs_are_one_payment(payready: InProcessSystem) -> None:
    """Workers process messages with one payment_id."""
    for number in range(ROUNDS):
        account = f"acct_twice{number}"
        run_concurrently(
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


def test_concurrent_expiry_runs_share_the_payments(payready: InProcessSystem) -> None:
    """Each expired payment is resolved and delivered by one of them."""
    for number in range(60):
        payready.initiate(f"p{number}", f"acct_up{number}", timeout_s=1)
    payready.drop_tasks()
    payready.clock.advance(2)
    done = run_concurrently(*[lambda: flow.expire_poll_or_rejoin_due_payments(payready.rt).follow_up] * 4)
    resolved = sorted(due.outcome["payment_id"] for step in done for due in step.deliveries)
    assert resolved == sorted(f"p{number}" for number in range(60))


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
            self.add(flow.accept_job(self.payready.rt, arrived, lambda _: []).follow_up)

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
    run_concurrently(*(lambda part=part: workers.submit(jobs[part::4]) for part in range(4)), *[workers.work] * 4)
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
