"""Exhaustive search of the model in `docs/model`, and mutation checks: removing a rule violates a claim."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from demo.processes import ROOT

MODEL = ROOT / "docs" / "model" / "payment.pml"
VIOLATED_CLAIMS = {
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
"""Start of the claim that is violated without the rule, by rule."""

pytestmark = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")), reason="spin and gcc are not installed (Debian: spin, gcc)"
)


def search(folder: Path, *options: str, optimize: str) -> str:
    """Return the output of a search in the mixed case, in which the second payment needs its own call."""
    for command in (
        ["spin", "-a", "-DONLY_MIXED", *options, str(MODEL)],
        ["gcc", "-w", optimize, "-DSAFETY", "-DCOLLAPSE", "-o", "pan", "pan.c"],
    ):
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
    return subprocess.run(
        ["./pan", "-m1000"], cwd=folder, check=False, capture_output=True, text=True, timeout=100
    ).stdout


def test_no_order_of_steps_violates_a_claim(tmp_path: Path) -> None:
    """The search is complete: it is not truncated and skips no state."""
    output = search(tmp_path, optimize="-O1")
    assert "errors: 0" in output
    assert not re.search("Search not completed|max search depth too small|out of memory", output)
    states = re.search(r"([\d.e+]+) states, stored", output)
    assert states is not None
    assert float(states[1]) > 500_000, "most of the model is not reached"


@pytest.mark.parametrize("rule", VIOLATED_CLAIMS)
def test_removing_a_rule_violates_its_claim(tmp_path: Path, rule: str) -> None:
    """The violated claim is the one that the rule protects."""
    output = search(tmp_path, f"-DBREAK_{rule}", optimize="-O0")
    violation = re.search(r"assertion violated (.*)", output)
    assert violation is not None, f"nothing depends on {rule}"
    assert violation[1].lstrip("( !").startswith(VIOLATED_CLAIMS[rule]), violation[1]


def test_each_rule_of_the_model_can_be_removed() -> None:
    """The mutation checks cover all rules."""
    assert set(re.findall(r"BREAK_([A-Z0-9_]+)", MODEL.read_text())) == set(VIOLATED_CLAIMS)
