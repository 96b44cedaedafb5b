"""Short chaos test: servers crash, Redis is emptied, processes are killed and frozen, and no invariant is violated."""

import subprocess
import sys
from pathlib import Path

import pytest

from demo.processes import ROOT, Processes
from tests.chaos.__main__ import ChaosTest
from tests.chaos.chaos_plan import draw_plan
from tests.chaos.chaos_system import ChaosSystem

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
