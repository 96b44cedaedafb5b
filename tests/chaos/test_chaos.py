"""A short storm: servers crash, Redis is emptied, processes are killed and frozen; told from outside, all holds."""

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
def test_a_short_storm_violates_nothing(tmp_path: Path) -> None:
    """When it does, the last line says how to have the same storm again."""
    options = [f"--seed={SEED}", f"--payments={PAYMENTS}", f"--faults={FAULTS}", f"--folder={tmp_path}"]
    storm = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *options],
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=380,
    )
    assert storm.returncode == 0, storm.stdout
    assert "\nheld\n" in storm.stdout


def test_the_same_seed_is_the_same_storm() -> None:
    """And another seed is another one."""
    assert draw_plan(SEED, PAYMENTS, FAULTS) == draw_plan(SEED, PAYMENTS, FAULTS)
    assert draw_plan(SEED, PAYMENTS, FAULTS).faults != draw_plan(SEED + 1, PAYMENTS, FAULTS).faults


def test_a_storm_is_over_when_a_process_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so with the process's last words, and waits for nothing more."""
    with Processes(tmp_path, {}) as processes:
        processes.start("worker1", "sh -c 'echo alas; exit 1'").wait()
        made = ChaosSystem.__new__(ChaosSystem)
        made.processes, made.fallen = processes, []
        storm = ChaosTest(made, draw_plan(SEED, PAYMENTS, FAULTS))
        monkeypatch.setattr(storm, "_send", lambda first: pytest.fail(f"message {first} is still sent"))
        storm.run()
    [fallen] = storm.fallen
    assert "worker1 ended with status 1" in fallen
    assert fallen.endswith("alas")
