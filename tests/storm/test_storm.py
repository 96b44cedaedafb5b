"""A short storm: servers crash, Redis is emptied, processes are killed and frozen; told from outside, all holds."""

import subprocess
import sys
from pathlib import Path

import pytest

from console.processes import ROOT
from tests.storm.plan import draw

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
