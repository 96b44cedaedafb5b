"""Short chaos test: servers crash, Redis is emptied, processes are killed and frozen, and no invariant is violated."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from demo.processes import ROOT, Processes
from tests.chaos.__main__ import ChaosTest
from tests.chaos.chaos_plan import ChaosPlan, draw_plan
from tests.chaos.chaos_system import ChaosSystem
from tests.chaos.invariants import INVARIANTS, Observed

pytestmark = pytest.mark.slow


SEED, PAYMENTS, FAULTS = 202, 60, 6


@pytest.mark.timeout(400)
def test_short_chaos_test_violates_no_invariant(tmp_path: Path) -> None:
    """On failure the last line of the output is the command that repeats the run."""
    options = [f"--seed={SEED}", f"--payments={PAYMENTS}", f"--faults={FAULTS}", f"--folder={tmp_path}"]
    completed = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *options],
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=380,
    )
    assert completed.returncode == 0, completed.stdout
    assert "\npassed\n" in completed.stdout


def test_same_seed_draws_same_plan() -> None:
    """Another seed draws another plan."""
    assert draw_plan(SEED, PAYMENTS, FAULTS) == draw_plan(SEED, PAYMENTS, FAULTS)
    assert draw_plan(SEED, PAYMENTS, FAULTS).faults != draw_plan(SEED + 1, PAYMENTS, FAULTS).faults


def test_unexpected_exit_of_a_process_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run reports the end of the process's log and does not wait for payments."""
    with Processes(tmp_path, {}) as processes:
        processes.start("worker1", "sh -c 'echo the reason; exit 1'").wait()
        system = ChaosSystem.__new__(ChaosSystem)
        system.processes, system.unexpected_exits = processes, []
        chaos_test = ChaosTest(system, draw_plan(SEED, PAYMENTS, FAULTS))
        monkeypatch.setattr(chaos_test, "_send", lambda first: pytest.fail(f"message {first} is still sent"))
        chaos_test.run()
    [message] = chaos_test.unexpected_exits
    assert "worker1 exited with status 1" in message
    assert message.endswith("the reason")


AT = datetime(2026, 11, 27, tzinfo=UTC)


def released(payment_id: str, verdict: str = "sufficient") -> dict[str, Any]:
    row = {"payment_id": payment_id, "account_id": "acct_1", "state": "released", "amount": "70.00"}
    return row | {"outcome": {"verdict": verdict}, "balance_id": "bal_1", "resolved_at": AT, "hold_until": AT}


def debit(payment_id: str, *, paid: bool, after_s: float = 0) -> dict[str, Any]:
    row = {"payment_id": payment_id, "account_id": "acct_1", "amount": "70.00"}
    return row | {"paid": paid, "balance_before": "100.00" if paid else "30.00", "at": AT.timestamp() + after_s}


def found_about_debits(payments: list[dict[str, Any]], debits: list[dict[str, Any]]) -> list[int]:
    observed = Observed(
        sent_at={},
        delivered_results=[],
        payments=payments,
        replies=[],
        refreshes=[],
        fee_entries=[],
        balances=[],
        calls=[],
        deliveries=[],
        debits=debits,
    )
    checks = (
        "the bank can pay every released payment",
        "no funds hold ends before its debit",
        "every released payment is debited",
    )
    return [len(list(INVARIANTS[name](ChaosPlan(seed=1, jobs=[], faults=[]), observed))) for name in checks]


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
