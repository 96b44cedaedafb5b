"""A ledger that lost its last commits is reconciled with Redis, the results of the tasks, and the provider."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.support.in_process import START, InProcessSystem, MakeSystem
from worker import flow
from worker.errors import RateLimited
from worker.flow.failover_findings import Finding, FindingKind, ResultState, StoredResult
from worker.ledger.engine import open_engine
from worker.quiltt.messages import PolledAccount

A = "acct_1"
SINCE = START - timedelta(hours=1)


@pytest.fixture
def payready(make_sqlite_system: MakeSystem) -> Iterator[InProcessSystem]:
    """Create an in-process system whose ledger is a file that can be restored."""
    with make_sqlite_system() as system:
        yield system


@contextmanager
def lost_commits(payready: InProcessSystem, tmp_path: Path) -> Iterator[None]:
    """Restore the ledger after the block to its state before the block. Redis keeps all."""
    original, copy = str(payready.engine.url.database), tmp_path / "restored.db"
    with closing(sqlite3.connect(original)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    yield
    payready.drop_tasks()
    payready.engine.dispose()
    payready.rt.engine = open_engine(f"sqlite:///{copy}", connections=10)
    payready.rt.cap_usage = type(payready.rt.cap_usage)()


def result_of(payready: InProcessSystem, task_id: str) -> StoredResult:
    """Return the result of a task as the result backend has it."""
    [(state, outcome)] = payready.delivered[task_id]
    return StoredResult(task_id=task_id, state=ResultState(state), at=payready.clock.now, outcome=outcome)


def close(payready: InProcessSystem, *results: StoredResult) -> list[Finding]:
    """Find the losses and close them."""
    found = flow.find_losses(payready.rt, results, SINCE)
    return flow.close_losses(payready.rt, found, results)


def kinds(found: list[Finding]) -> list[FindingKind]:
    """Return the kinds of the findings."""
    return [finding.kind for finding in found]


def polled(balance_id: str, at: Any) -> PolledAccount:
    """Return what the provider shows of the account."""
    amounts = {"available": Decimal(100), "current": None, "limit": None}
    balance = {"id": balance_id, "at": at.replace(microsecond=0).isoformat(), "source": "REFRESH", **amounts}
    return PolledAccount(balance=balance)


def test_nothing_is_found_if_nothing_was_lost(payready: InProcessSystem) -> None:
    payready.initiate("p1", A)
    payready.run_tasks()
    waiting = StoredResult(task_id="task_1", state=ResultState.WAITING, at=START + timedelta(seconds=120))
    assert flow.find_losses(payready.rt, [waiting], SINCE) == []
    payready.balance(A)
    payready.run_tasks()
    assert flow.find_losses(payready.rt, [result_of(payready, "task_1")], SINCE) == []


@pytest.mark.parametrize("is_requested_in_ledger", [False, True])
def test_lost_call_gets_a_pending_entry_and_is_not_repeated_at_once(
    payready: InProcessSystem,
    tmp_path: Path,
    is_requested_in_ledger: bool,  # noqa: FBT001
) -> None:
    """The balance of the call then releases the payment, and posts the fee."""
    if is_requested_in_ledger:
        payready.provider.script[A] = [RateLimited("too many requests", None), 202]
    payready.initiate("p1", A, amount="5.00")
    if is_requested_in_ledger:
        payready.run_tasks()
        payready.clock.advance(2)
    with lost_commits(payready, tmp_path):
        payready.run_maintenance() if is_requested_in_ledger else payready.run_tasks()
        assert payready.fees(A)[-1].endswith(("posted", "pending"))
    calls = len(payready.provider.calls)
    assert kinds(closed := close(payready)) == [FindingKind.LOST_CALL]
    assert closed[0].is_closed
    assert payready.fees(A)[-1].endswith("pending")
    assert payready.refreshes(A) == ["uncertain"]
    payready.pass_time(10)
    assert len(payready.provider.calls) == calls
    payready.balance(A)
    payready.run_tasks()
    assert payready.outcome("p1")["verdict"] == "sufficient"
    assert payready.fees(A)[-1].endswith("posted")
    assert flow.find_losses(payready.rt, [], SINCE) == []


def test_lost_call_beside_a_later_call_is_only_an_entry(payready: InProcessSystem, tmp_path: Path) -> None:
    """The roles ran on, and made another call for the account."""
    with lost_commits(payready, tmp_path):
        payready.initiate("p1", A)
        payready.run_tasks()
    [lost] = flow.find_losses(payready.rt, [], SINCE)
    payready.flush()
    payready.initiate("p2", A)
    payready.run_tasks()
    [closed] = flow.close_losses(payready.rt, [lost], [])
    assert closed.is_closed
    assert sorted(payready.refreshes(A)) == ["accepted", "unanswered"]
    assert len(payready.fees(A)) == 3  # the lost call is pending, the later one is pending and posted


@pytest.mark.parametrize("available", ["100.00", "1.00"])
def test_delivered_outcome_becomes_the_outcome_of_the_ledger(
    payready: InProcessSystem, tmp_path: Path, available: str
) -> None:
    """The payment is not decided again, and the same outcome is delivered again."""
    payready.initiate("p1", A, amount="5.00")
    payready.run_tasks()
    with lost_commits(payready, tmp_path):
        payready.balance(A, available)
        payready.run_tasks()
    first = result_of(payready, "task_1")
    closed = close(payready, first)
    assert kinds(closed) == [FindingKind.LOST_RESOLUTION, FindingKind.LOST_BALANCE]
    assert [finding.is_closed for finding in closed] == [True, False]
    payready.pass_time(200)
    assert len(payready.delivered["task_1"]) == 2
    assert payready.outcome("p1")  # asserts that both are the same
    assert FindingKind.LOST_RESOLUTION not in kinds(close(payready, first))


def test_payment_that_a_role_resolves_meanwhile_is_not_closed(payready: InProcessSystem, tmp_path: Path) -> None:
    """The next run shows the contradiction."""
    payready.initiate("p1", A, amount="5.00")
    payready.run_tasks()
    with lost_commits(payready, tmp_path):
        payready.balance(A, "100")
        payready.run_tasks()
    first = result_of(payready, "task_1")
    found = flow.find_losses(payready.rt, [first], SINCE)
    payready.pass_time(200)  # the payment expires
    closed = flow.close_losses(payready.rt, found, [first])
    assert [finding.is_closed for finding in closed if finding.kind == FindingKind.LOST_RESOLUTION] == [False]
    assert FindingKind.CONTRADICTION in kinds(flow.find_losses(payready.rt, [first], SINCE))


def test_delivered_release_keeps_its_funds_hold(payready: InProcessSystem, tmp_path: Path) -> None:
    """A later payment is judged on what is left."""
    payready.initiate("p1", A, amount="60.00")
    payready.run_tasks()
    with lost_commits(payready, tmp_path):
        payready.balance(A, "100.00")
        payready.run_tasks()
    close(payready, result_of(payready, "task_1"))
    payready.pass_time(60)
    payready.initiate("p2", A, amount="60.00", max_balance_age_s=0)
    payready.run_tasks()
    payready.balance(A, "100.00")
    payready.run_tasks()
    assert payready.state_or_reason("p2") == "insufficient_funds"


def test_opposite_outcome_is_for_a_person_to_decide(payready: InProcessSystem, tmp_path: Path) -> None:
    """The roles ran on until the deadline."""
    payready.initiate("p1", A, timeout_s=30)
    payready.run_tasks()
    with lost_commits(payready, tmp_path):
        payready.balance(A)
        payready.run_tasks()
    released = result_of(payready, "task_1")
    payready.flush()
    payready.pass_time(40)
    assert payready.state_or_reason("p1") in ("timeout", "provider_unavailable")
    [finding] = close(payready, released)
    assert (finding.kind, finding.is_closed) == (FindingKind.CONTRADICTION, False)
    assert finding.decision is not None


def test_lost_payment_is_closable_a_minute_after_its_deadline(payready: InProcessSystem, tmp_path: Path) -> None:
    with lost_commits(payready, tmp_path):
        payready.initiate("p1", A)
    deadline = START + timedelta(seconds=120)
    waiting = StoredResult(task_id="task_1", state=ResultState.WAITING, at=deadline, account_id=A)
    [finding] = flow.find_losses(payready.rt, [waiting], SINCE)
    assert finding.kind == FindingKind.LOST_PAYMENT
    assert finding.decision == "run the command again after 2026-11-22T12:03:00Z"
    payready.clock.advance(180)
    [finding] = flow.find_losses(payready.rt, [waiting], SINCE)
    assert finding.decision is None


@pytest.mark.parametrize("available", ["100.00", "1.00"])
def test_outcome_without_payment_is_for_a_person_to_decide(
    payready: InProcessSystem, tmp_path: Path, available: str
) -> None:
    """Its job must not be sent again: it could be released once more."""
    with lost_commits(payready, tmp_path):
        payready.initiate("p1", A, amount="5.00")
        payready.run_tasks()
        payready.balance(A, available)
        payready.run_tasks()
    found = close(payready, result_of(payready, "task_1"))
    assert FindingKind.LOST_OUTCOME in kinds(found)
    assert all(finding.decision and not finding.is_closed for finding in found)


def test_lost_balance_is_read_from_the_provider_again(payready: InProcessSystem, tmp_path: Path) -> None:
    """It answers its call, which the ledger has, and releases the payment before the deadline."""
    payready.initiate("p1", A, profile_id="p_1", timeout_s=600)
    payready.run_tasks()
    with lost_commits(payready, tmp_path):
        balance_id = payready.balance(A)
        payready.run_tasks()
    payready.provider.accounts[A] = polled(balance_id, payready.clock.now)
    [finding] = close(payready)
    assert (finding.kind, finding.is_closed, finding.decision) == (FindingKind.LOST_BALANCE, True, None)
    assert payready.payment("p1")["state"] == "released"
    assert payready.fees(A)[-1] == "1 posted"


def test_provider_shows_a_balance_that_no_store_has(payready: InProcessSystem, tmp_path: Path) -> None:
    """The call is lost, and its balance has not arrived yet."""
    payready.initiate("p1", A, profile_id="p_1", timeout_s=600)
    with lost_commits(payready, tmp_path):
        payready.run_tasks()
    payready.provider.accounts[A] = polled("bal_77", payready.clock.now)
    found = flow.find_losses(payready.rt, [], SINCE)
    assert kinds(found) == [FindingKind.LOST_CALL, FindingKind.LOST_BALANCE]
    assert "the provider has a REFRESH balance" in found[1].detail
    closed = flow.close_losses(payready.rt, found, [])
    assert [finding.is_closed for finding in closed] == [True, True]
    assert payready.fees(A) == ["1 pending", "1 posted"]


def test_older_balance_at_the_provider_is_not_reported(payready: InProcessSystem, tmp_path: Path) -> None:
    """It may be archived."""
    payready.initiate("p1", A, profile_id="p_1", timeout_s=600)
    with lost_commits(payready, tmp_path):
        payready.run_tasks()
    payready.provider.accounts[A] = polled("bal_77", SINCE - timedelta(days=40))
    assert kinds(flow.find_losses(payready.rt, [], SINCE)) == [FindingKind.LOST_CALL]


def test_losses_before_the_given_time_are_not_reported(payready: InProcessSystem, tmp_path: Path) -> None:
    with lost_commits(payready, tmp_path):
        payready.initiate("p1", A)
        payready.run_tasks()
    assert flow.find_losses(payready.rt, [], START + timedelta(seconds=1)) == []
