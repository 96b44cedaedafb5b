"""Short chaos test: servers crash, Redis is emptied, processes are killed and frozen, and no invariant is violated."""

import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from demo.processes import ROOT, Processes
from tests.chaos.__main__ import ChaosTest
from tests.chaos.chaos_plan import ChaosPlan, PlannedJob, Topology, draw_plan
from tests.chaos.chaos_servers import ChaosServers
from tests.chaos.chaos_system import ChaosSystem
from tests.chaos.invariants import INVARIANTS, Observed
from tests.chaos.resending import RESEND_AFTER_S, Resender

pytestmark = pytest.mark.slow


SEED, PAYMENTS, FAULTS = 202, 60, 6
FAILOVER_SEED, FAILOVER_PAYMENTS, FAILOVER_FAULTS = 50, 80, 5
"""With both failovers: two of Redis and one of PostgreSQL."""
TOPOLOGY = Topology(sentinel=True, postgres_failover=True)
SERVERS = cast(ChaosServers, None)
"""No servers: the test needs none."""


@pytest.mark.timeout(400)
def test_short_chaos_test_violates_no_invariant(tmp_path: Path) -> None:
    """On failure the last line of the output is the command that repeats the run."""
    run_chaos_test(tmp_path, f"--seed={SEED}", f"--payments={PAYMENTS}", f"--faults={FAULTS}")


@pytest.mark.topology
@pytest.mark.timeout(400)
def test_short_chaos_test_with_failovers_violates_no_invariant(tmp_path: Path) -> None:
    """Masters of Redis and a primary of PostgreSQL are killed, and their successors are promoted."""
    numbers = [f"--seed={FAILOVER_SEED}", f"--payments={FAILOVER_PAYMENTS}", f"--faults={FAILOVER_FAULTS}"]
    output = run_chaos_test(tmp_path, *TOPOLOGY.options, *numbers)
    assert "2 redis failover" in output
    assert "1 postgres failover" in output


def run_chaos_test(folder: Path, *options: str) -> str:
    completed = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *options, f"--folder={folder}"],
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=380,
    )
    assert completed.returncode == 0, completed.stdout
    assert "\npassed\n" in completed.stdout
    return completed.stdout


def test_same_seed_draws_same_plan() -> None:
    """Another seed draws another plan."""
    assert draw_plan(SEED, PAYMENTS, FAULTS) == draw_plan(SEED, PAYMENTS, FAULTS)
    assert draw_plan(SEED, PAYMENTS, FAULTS).faults != draw_plan(SEED + 1, PAYMENTS, FAULTS).faults


def test_unexpected_exit_of_a_process_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run reports the end of the process's log and does not wait for payments."""
    with Processes(tmp_path, {}) as processes:
        processes.start("worker1", "sh -c 'echo the reason; exit 1'").wait()
        system = ChaosSystem.__new__(ChaosSystem)
        system.processes, system.servers, system.unexpected_exits = processes, SERVERS, []
        chaos_test = ChaosTest(system, draw_plan(SEED, PAYMENTS, FAULTS), Topology())
        monkeypatch.setattr(chaos_test, "_send", lambda first: pytest.fail(f"message {first} is still sent"))
        chaos_test.run()
    [message] = chaos_test.unexpected_exits
    assert "worker1 exited with status 1" in message
    assert message.endswith("the reason")


def violations_of_outcomes(resent: dict[str, list[str]], *callback_lines: tuple[str, str]) -> list[str]:
    """Return the violations of one job in the task `task`; each line is a callback's (parent id, id)."""
    plan = ChaosPlan(seed=1, jobs=[PlannedJob("pay_1", "task", {})], faults=[])
    lines = [
        {"task": "ledger.not_ready", "parent_id": parent_id, "id": own_id, "args": [parent_id, "pay_1"]}
        for parent_id, own_id in callback_lines
    ]
    return list(INVARIANTS["one outcome per payment, one callback per task"](plan, observed(lines, resent)))


def test_job_that_was_sent_again_needs_a_callback_in_one_of_its_tasks() -> None:
    """A failover may lose the callbacks of the others. No task has two."""
    resent = {"task": ["task-resent1"]}
    assert not violations_of_outcomes({}, ("task", "a"), ("task", "a"))
    assert not violations_of_outcomes(resent, ("task-resent1", "b"))
    assert not violations_of_outcomes(resent, ("task", "a"), ("task-resent1", "b"))
    assert violations_of_outcomes(resent) == ["task task has 0 callbacks"]
    assert violations_of_outcomes(resent, ("task", "a"), ("task-resent1", "b"), ("task-resent1", "c"))
    assert violations_of_outcomes({}, ("task", "a"), ("task-resent1", "b"))


class SystemWithoutRedis:
    """A system whose broker can be away. `sent` has the task ids of the messages that it accepted."""

    def __init__(self) -> None:
        self.is_broker_available, self.sent = True, list[str]()

    def send(self, messages: list[PlannedJob]) -> bool:
        self.sent += [message.task_id for message in messages if self.is_broker_available]
        return self.is_broker_available

    def rows_if_available(self, _: str) -> list[dict[str, Any]]:
        return [{"task_id": "known", "delivered_at": AT}]


def test_jobs_without_outcome_are_sent_again_in_new_tasks() -> None:
    """An outcome of any of the tasks ends this. Messages without an outcome of their own are not repeated."""
    system = SystemWithoutRedis()
    resender = Resender(cast(ChaosSystem, system))
    resender.track([PlannedJob(f"pay_{name}", name, {}) for name in ("known", "lost", "ended")], now=100)
    resender.track([PlannedJob("pay_known", "cancel", None)], now=100)
    resender.receive([{"parent_id": "ended"}])
    resender.send_overdue(100 + RESEND_AFTER_S)
    assert system.sent == []
    system.is_broker_available = False
    resender.send_overdue(110 + RESEND_AFTER_S)
    system.is_broker_available = True
    resender.send_overdue(120 + RESEND_AFTER_S)
    assert system.sent == ["known-resent2", "lost-resent1"]
    assert resender.counts == {"jobs not in the ledger": 1, "callbacks that did not run": 1}
    resender.receive([{"parent_id": "known-resent1"}, {"parent_id": "lost"}])
    resender.send_overdue(300 + RESEND_AFTER_S)
    assert not resender.pending
    assert len(system.sent) == 2


AT = datetime(2026, 11, 27, tzinfo=UTC)


def observed(callbacks: list[dict[str, Any]], resent: dict[str, list[str]]) -> Observed:
    return Observed(
        sent_at={},
        delivered_results=callbacks,
        payments=[],
        replies=[],
        refreshes=[],
        fee_entries=[],
        balances=[],
        calls=[],
        deliveries=[],
        debits=[],
        resent_tasks=resent,
    )


def released(payment_id: str, verdict: str = "sufficient") -> dict[str, Any]:
    row = {"payment_id": payment_id, "account_id": "acct_1", "state": "released", "amount": "70.00"}
    return row | {"outcome": {"verdict": verdict}, "balance_id": "bal_1", "resolved_at": AT, "hold_until": AT}


def debit(payment_id: str, *, paid: bool, after_s: float = 0) -> dict[str, Any]:
    row = {"payment_id": payment_id, "account_id": "acct_1", "amount": "70.00"}
    return row | {"paid": paid, "balance_before": "100.00" if paid else "30.00", "at": AT.timestamp() + after_s}


def found_about_debits(payments: list[dict[str, Any]], debits: list[dict[str, Any]]) -> list[int]:
    seen = replace(observed([], {}), payments=payments, debits=debits)
    checks = (
        "the bank can pay every released payment",
        "no funds hold ends before its debit",
        "every released payment is debited",
    )
    return [len(list(INVARIANTS[name](ChaosPlan(seed=1, jobs=[], faults=[]), seen))) for name in checks]


def test_debit_that_the_bank_could_not_pay_is_a_violation() -> None:
    """Unless the payment was released without a check, because the provider does not know the balance."""
    debits = [debit("pay_1", paid=True), debit("pay_2", paid=False)]
    assert found_about_debits([released("pay_1"), released("pay_2")], debits) == [1, 0, 0]
    assert found_about_debits([released("pay_1"), released("pay_2", "unchecked")], debits) == [0, 0, 0]


def test_release_without_a_debit_is_a_violation() -> None:
    """The bank must be asked to pay each released payment, and no other."""
    assert found_about_debits([released("pay_1")], []) == [0, 0, 1]
    assert found_about_debits([], [debit("pay_1", paid=True)]) == [0, 0, 1]


def test_debit_after_the_end_of_its_funds_hold_is_a_violation() -> None:
    """The plan of the test is wrong then, or payready ended the funds hold early. Clocks may differ by a second."""
    assert found_about_debits([released("pay_1")], [debit("pay_1", paid=True, after_s=1.0)]) == [0, 0, 0]
    assert found_about_debits([released("pay_1")], [debit("pay_1", paid=True, after_s=1.1)]) == [0, 1, 0]
