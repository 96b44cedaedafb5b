"""The model of `docs/model` is searched to its end, and each rule that is taken out of it is missed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from demo.processes import ROOT

MODEL = ROOT / "docs" / "model" / "payment.pml"
MISSED = {
    "ONE_WRITE_DECIDES": "pay[",
    "DEADLINE": "pay[",
    "FRESHNESS": "own[",
    "ONE_IN_FLIGHT": "refresh[",
    "ONE_REPEAT": "call_count[",
    "ENTRY_BEFORE_CALL": "entry[",
    "UNKNOWN_STAYS_PENDING": "accepted",
    "COMMIT_BEFORE_2XX": "event[",
    "DELIVER_THEN_MARK": "delivered",
    "SWEEP": "refresh[",
}
"""By rule, what the claim that falls without it begins with."""

pytestmark = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")), reason="spin and gcc are not installed (Debian: spin, gcc)"
)


def search(folder: Path, *options: str, optimize: str) -> str:
    """What a search of the model says: of the mixed case, in which the second payment needs a call of its own."""
    for command in (
        ["spin", "-a", "-DONLY_MIXED", *options, str(MODEL)],
        ["gcc", "-w", optimize, "-DSAFETY", "-DCOLLAPSE", "-o", "pan", "pan.c"],
    ):
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
    return subprocess.run(
        ["./pan", "-m1000"], cwd=folder, check=False, capture_output=True, text=True, timeout=100
    ).stdout


def test_every_order_of_all_steps_keeps_every_claim(tmp_path: Path) -> None:
    """To the end: nothing was cut off, and no state left out."""
    said = search(tmp_path, optimize="-O1")
    assert "errors: 0" in said
    assert not re.search("Search not completed|max search depth too small|out of memory", said)
    states = re.search(r"([\d.e+]+) states, stored", said)
    assert states is not None
    assert float(states[1]) > 500_000, "most of the model is not reached"


@pytest.mark.parametrize("rule", MISSED)
def test_a_rule_that_is_taken_away_is_missed(tmp_path: Path, rule: str) -> None:
    """By the claim that it is there for."""
    said = search(tmp_path, f"-DBREAK_{rule}", optimize="-O0")
    fallen = re.search(r"assertion violated (.*)", said)
    assert fallen is not None, f"nothing depends on {rule}"
    assert fallen[1].lstrip("( !").startswith(MISSED[rule]), fallen[1]


def test_each_rule_of_the_model_can_be_taken_away() -> None:
    """None is left untried."""
    assert set(re.findall(r"BREAK_([A-Z0-9_]+)", MODEL.read_text())) == set(MISSED)
