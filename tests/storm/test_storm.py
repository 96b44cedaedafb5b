"""A short storm: servers crash, Redis is emptied, processes are killed and frozen; told from outside, all holds."""

import subprocess
import sys
from pathlib import Path

import pytest

from console.processes import ROOT, Processes
from tests.storm.__main__ import Storm
from tests.storm.plan import draw
from tests.storm.rig import Rig

SEED, PAYMENTS, FAULTS = 202, 60, 6


@pytest.mark.timeout(400)
def test_a_short_storm_violates_nothing(tmp_path: Path) -> None:
    """When it does, the last line says how to have the same storm again."""
    options = [f"--seed={SEED}", f"--payments={PAYMENTS}", f"--faults={FAULTS}", f"--folder={tmp_path}"]
    storm = subprocess.run(
        [sys.executable, "-m", "tests.storm", *options],
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
    assert draw(SEED, PAYMENTS, FAULTS) == draw(SEED, PAYMENTS, FAULTS)
    assert draw(SEED, PAYMENTS, FAULTS).faults != draw(SEED + 1, PAYMENTS, FAULTS).faults


def test_a_storm_is_over_when_a_process_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so with the process's last words, and waits for nothing more."""
    with Processes(tmp_path, {}) as processes:
        processes.start("worker1", "sh -c 'echo alas; exit 1'").wait()
        made = Rig.__new__(Rig)
        made.processes, made.fallen = processes, []
        storm = Storm(made, draw(SEED, PAYMENTS, FAULTS))
        monkeypatch.setattr(storm, "_send", lambda first: pytest.fail(f"message {first} is still sent"))
        storm.rage()
    [fallen] = storm.fallen
    assert "worker1 ended with status 1" in fallen
    assert fallen.endswith("alas")
