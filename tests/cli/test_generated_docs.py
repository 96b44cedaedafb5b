"""What the documentation says is what the code says."""

import re
from pathlib import Path

import pytest

from cli.generated_docs import generated_files, state_diagram
from config.settings import ENV_PREFIX, Settings, load
from demo.processes import ROOT
from worker.rules.states import PAYMENT_TRANSITIONS, PaymentState

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("path", generated_files(), ids=lambda path: path.name)
def test_what_is_made_from_code_is_current(path: Path) -> None:
    """If not, run `make docs`."""
    assert path.read_text() == generated_files()[path]


def test_a_diagram_shows_every_transition_of_the_law_and_no_other() -> None:
    """A state that nothing leads out of is final."""
    lines = state_diagram(PAYMENT_TRANSITIONS, PaymentState.WAITING).splitlines()[1:]
    transitions = {f"    {state} --> {after}: {event}" for (state, event), after in PAYMENT_TRANSITIONS.items()}
    assert set(lines) == transitions | {
        "    [*] --> waiting",
        "    released --> [*]",
        "    failed --> [*]",
    }


def test_every_setting_is_explained() -> None:
    """In one sentence at least, next to its definition."""
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_the_example_environment_is_one_that_payready_starts_with() -> None:
    """Each of its variables is known, and none is missing; taking off every # changes nothing."""
    lines = [line[1:] for line in (ROOT / ".env.example").read_text().splitlines() if line.startswith(f"#{ENV_PREFIX}")]
    environ = dict(line.split("=", 1) for line in lines)
    assert {name.removeprefix(ENV_PREFIX).lower() for name in environ} == set(Settings.model_fields)
    given = {name: value for name, value in environ.items() if name != "PAYREADY_PRICE_LIST_FILE"}
    assert load(given) == load({})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of the documentation leads to a file that is there."""
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_that_pages_name_are_settings(page: Path) -> None:
    """A page that names a variable names one that payready knows."""
    named = set(re.findall(rf"{ENV_PREFIX}([A-Z_]+)\b", page.read_text()))
    assert {name for name in named if name.lower() not in Settings.model_fields} == set()
